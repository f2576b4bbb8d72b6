"""The wheel has the files of the tree, and the edge tests run on the oldest ONNX Runtime that the package allows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"tp_runtime": "tp_runtime", "export": "tp_export", "models": "tp_export/manifests"}
SHIPPED = {".py", ".txt", ".json", ".j2", ".html", ".css", ".js", ".svg"}


def test_the_wheel_contains_exactly_the_files_of_the_tree(tmp_path: Path) -> None:
    # The wheel is built from a copy, because setuptools leaves its own folders in the tree and would ship the files
    # of an older build.
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w"]
    subprocess.run([*command, str(tmp_path), str(tmp_path / "tree")], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SHIPPED and "__pycache__" not in file.parts
    }
    assert packed == expected


def test_the_edge_tests_run_on_the_oldest_onnxruntime_that_the_package_allows() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    allowed = {re.sub(r"^[^>]*>=", "", requirement) for extra in ("cpu", "gpu") for requirement in extras[extra]}
    tested = re.search(r"^OLDEST_RUNTIME := onnxruntime==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested and allowed == {tested[1]}

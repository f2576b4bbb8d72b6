"""The wheel holds every module and data file of the tree, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"tp_runtime": "tp_runtime", "export": "tp_export", "models": "tp_export/manifests"}
SHIPPED = {".py", ".txt", ".json", ".j2"}


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    # In a copy: setuptools leaves its own folders behind, and would ship what an older build left in them.
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

"""The rooms (the packages of both halves): which room may import which, and how the documentation draws them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HALVES = {"tp_runtime": ROOT / "tp_runtime", "tp_export": ROOT / "export"}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
ROOMS = sorted((half, init.parent.name) for half, folder in HALVES.items() for init in folder.glob("*/__init__.py"))

FILES = {
    ".".join((half, *file.relative_to(folder).with_suffix("").parts))
    for half, folder in HALVES.items()
    for file in folder.rglob("*.py")
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield every module of both halves, of the benchmarks and of the demo, with its dotted name."""
    for half, folder in {**HALVES, "benchmarks": ROOT / "benchmarks", "demo": ROOT / "demo"}.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((half, *parts)), ast.parse(file.read_text(encoding="utf-8"))


def imports(name: str, tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield each module of this project that a module imports from, and whether the import is relative."""
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target.split(".")[0] in HALVES:
                yield target, node.level > 0
                for alias in node.names:  # `from ..room import file` imports from a file too
                    if f"{target}.{alias.name}" in FILES:
                        yield f"{target}.{alias.name}", node.level > 0
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in HALVES:
                    yield alias.name, False


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_rooms_import_only_what_the_contracts_allow() -> None:
    # import-linter disables every logger that exists before it, so it runs in a separate process.
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_other_rooms_import_from_the_room_not_from_its_files() -> None:
    """A room's `__init__` is its interface; only the room itself imports from its files."""
    violations = [
        f"{name} imports from {target}"
        for name, tree in modules()
        for target, _relative in imports(name, tree)
        if target.count(".") > 1 and room_of(target) != room_of(name)
    ]
    assert not violations


def test_imports_are_relative_within_a_half_and_absolute_across() -> None:
    mixed = [
        f"{name} imports from {target}"
        for name, tree in modules()
        for target, relative in imports(name, tree)
        if relative != (name.split(".")[0] == target.split(".")[0])
    ]
    assert not mixed


@pytest.mark.parametrize(("half", "room"), ROOMS)
def test_every_room_states_its_purpose_and_what_it_does_not_know(half: str, room: str) -> None:
    docstring = ast.get_docstring(ast.parse((HALVES[half] / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring and "This room knows nothing of" in docstring


@pytest.mark.parametrize("half", HALVES)
def test_the_documentation_draws_the_layers_of_the_contract(half: str) -> None:
    """The picture in docs/architecture.md has the layers of the contract, in the same order, and names every room."""
    layers = next(c["layers"] for c in CONTRACTS if c["type"] == "layers" and c["containers"] == [half])
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(rf"```text\n{half}\n(.*?)```", page, re.DOTALL)
    assert picture, f"docs/architecture.md draws no picture of {half}"
    drawn = [re.split(r"\s{2,}", line.strip())[0] for line in picture[1].splitlines() if line.strip()]
    expected = [" | ".join(part.strip() for part in layer.split("|")) for layer in layers]
    assert drawn == expected

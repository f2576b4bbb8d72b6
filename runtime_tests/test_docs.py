"""The list of errors is one list: the classes, the documentation and the tests."""

from __future__ import annotations

import re
from pathlib import Path

from tp_runtime import errors

ROOT = Path(__file__).parent.parent
BASES = {"TPError", "PatchError", "ModelError"}


def raised_classes() -> set[str]:
    return {name for name, value in vars(errors).items() if isinstance(value, type)} - BASES


def test_every_error_is_documented_and_no_other() -> None:
    table = (ROOT / "docs" / "errors.md").read_text()
    assert set(re.findall(r"\| (\w+Error) \|$", table, re.MULTILINE)) == raised_classes()


def test_every_error_has_a_test_that_raises_it() -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "runtime_tests").rglob("test_*.py"))
    expected = set(re.findall(r"pytest\.raises\(\(?(?:errors\.)?(\w+Error)", tests))
    assert raised_classes() <= expected


def test_the_readme_names_the_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

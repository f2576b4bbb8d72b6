"""The error classes, the documentation and the tests list the same errors, and the documentation names real files."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

from tp_runtime import errors
from tp_runtime.patch import Capabilities

ROOT = Path(__file__).parent.parent
BASES = {"TPError", "PatchError", "ModelError"}


def raised_classes() -> set[str]:
    """Return the names of the error classes that the code raises."""
    return {name for name, value in vars(errors).items() if isinstance(value, type)} - BASES


def test_the_documentation_lists_exactly_the_errors_that_exist() -> None:
    table = (ROOT / "docs" / "errors.md").read_text()
    assert set(re.findall(r"\| (\w+Error) \|$", table, re.MULTILINE)) == raised_classes()


def test_every_error_has_a_test_that_raises_it() -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "runtime_tests").rglob("test_*.py"))
    expected = set(re.findall(r"pytest\.raises\(\(?(?:errors\.)?(\w+Error)", tests))
    assert raised_classes() <= expected


def test_every_make_target_that_the_readme_names_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_test_that_the_documentation_names_exists() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "models" / "README.md"]
    named = {path for file in documents for path in re.findall(r"runtime_tests/[\w/]+(?:\.\w+)?", file.read_text())}
    assert named and not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_the_documentation_says_what_a_patch_can_do_in_the_words_of_the_code() -> None:
    table = (ROOT / "docs" / "travel.md").read_text().split("## What a patch can do")[1]
    weights, entries = (Capabilities.of(True, entries, "fp32") for entries in (False, True))
    for name in ("strength", "sums", "system", "exports", "precision"):
        cells = f"| {getattr(weights, name)} | {getattr(entries, name)} |\n"
        assert re.search(rf"^\| {name}[^|]*{re.escape(cells)}", table, re.MULTILINE), name


# These are files of other projects, and a placeholder.
NOT_OURS = {"convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "vllm/lora/peft_helper.py", "vllm/lora/utils.py"}
NOT_OURS |= {"models/NAME.json"}


def names_of_files(text: str, folders: str) -> set[str]:
    """Return the source files and pages that a text names, and the paths that start with one of `folders`, a|b|c."""
    sources = re.findall(r"(?<![\w./-])[\w./-]*\w\.(?:py|md|sh)\b", text)
    paths = re.findall(rf"(?<![\w./<-])(?:{folders})/[\w./-]+\.\w+", text)
    return {*sources, *paths} - NOT_OURS


def test_the_documentation_names_no_file_that_does_not_exist() -> None:
    """A page names a path relative to the repository's root or to itself; code may name the end of a path."""
    # git lists the files, because what it ignores, such as build/, is there only on some machines.
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}
    folders = "|".join({name.split("/")[0] for name in files if "/" in name and not name.startswith(".")})
    assert folders
    ends = {"/".join(Path(name).parts[-n:]) for name in files for n in range(1, 5)}
    missing = []
    for name in sorted(files):
        if not name.endswith((".md", ".py", ".toml", ".sh")):
            continue
        page, text = name.endswith(".md"), (ROOT / name).read_text(encoding="utf-8")
        for named in names_of_files(text if page else "\n".join(prose(text)), folders):
            exact = (ROOT / named).exists() or (ROOT / name).parent.joinpath(named).exists()
            if not exact and (named not in ends or (page and "/" in named)):
                missing.append(f"{name} names {named}")
    assert not missing


def prose(code: str) -> list[str]:
    """Return the docstrings and comments of Python code, or the comment lines of any other file."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return re.findall(r"#.*", code)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return docstrings + re.findall(r"(?:^|\s)#.*", code)

"""The pages of docs/: their text, and their examples, which tests run as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DOCS = Path(__file__).parent.parent / "docs"


def page(name: str) -> str:
    """Return the text of docs/NAME."""
    return (_DOCS / name).read_text(encoding="utf-8")


def examples(text: str) -> list[str]:
    """Return the blocks of Python in a text."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_examples(name: str, names: dict[str, Any]) -> Iterator[None]:
    """Run the examples of docs/NAME one after the other with the same names, and yield after each."""
    for example in examples(page(name)):
        exec(compile(example, f"docs/{name}", "exec"), names)
        yield

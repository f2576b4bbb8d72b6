"""The examples of docs/chat-templates.md run, one after the other, as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tp_runtime.model import PatchedModel
from tp_runtime.text import Result
from tp_runtime.text.reasoning import _TAGS
from tp_runtime.text.tool_families import NOTATIONS

PAGE = Path(__file__).parents[3] / "docs" / "chat-templates.md"


def test_every_example_of_the_page_runs(tiny_llama_export: Path) -> None:
    pytest.importorskip("llguidance")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {"model": PatchedModel.from_pretrained(tiny_llama_export, "cpu")}
    results = []
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
        results.append(names["result"])
    assert len(results) == 4 and isinstance(results[2], Result)
    assert results[2].tool_calls and results[2].finish_reason == "eos"


def test_the_page_names_every_notation_and_every_tag() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.split("| notation |")[1].split("\n\n")[0]
    named = [name for row in re.findall(r"^\| ([a-z][^|]*) \|", table, re.MULTILINE) for name in row.split(", ")]
    assert sorted(named) == sorted(notation.family for notation in NOTATIONS)
    assert all(f"`{opening}`" in page for opening, _closing in _TAGS)

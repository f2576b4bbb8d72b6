"""The examples of docs/chat-templates.md run, one after the other, as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime_tests.pages import page, run_examples
from tp_runtime.model import PatchedModel
from tp_runtime.text import Result
from tp_runtime.text.reasoning import _TAGS
from tp_runtime.text.tool_families import NOTATIONS

PAGE = "chat-templates.md"


def test_every_example_of_the_page_runs(tiny_llama_export: Path) -> None:
    pytest.importorskip("llguidance")
    names: dict[str, object] = {"model": PatchedModel.from_pretrained(tiny_llama_export, "cpu")}
    results = [names["result"] for _ran in run_examples(PAGE, names)]
    assert len(results) == 4 and isinstance(results[2], Result)
    assert results[2].tool_calls and results[2].finish_reason == "eos"


def test_the_page_names_every_notation_and_every_tag() -> None:
    text = page(PAGE)
    table = text.split("| notation |")[1].split("\n\n")[0]
    named = [name for row in re.findall(r"^\| ([a-z][^|]*) \|", table, re.MULTILINE) for name in row.split(", ")]
    assert sorted(named) == sorted(notation.family for notation in NOTATIONS)
    assert all(f"`{opening}`" in text for opening, _closing in _TAGS)

"""The examples of docs/requests.md run, one after the other, as they are written."""

from __future__ import annotations

import re
from pathlib import Path

from runtime_tests.pages import page, run_examples
from tp_runtime.model import PatchedModel

PAGE = "requests.md"


def test_every_example_of_the_page_runs(tiny_llama_export: Path) -> None:
    names: dict[str, object] = {"model": PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)}
    assert len(list(run_examples(PAGE, names))) == 4


def test_the_page_names_every_setting_with_its_default() -> None:
    from dataclasses import fields

    from tp_runtime.generation import Sampling

    rows = page(PAGE).split("| --- | --- | --- |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", rows)) - {"seed"} >= {field.name for field in fields(Sampling)} - {"seed"}

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

    stated: dict[str, float | None] = {}
    for row in page(PAGE).split("| --- | --- | --- |")[1].split("\n\n")[0].strip().splitlines():
        first, second = row.split("|")[1:3]
        names, values = re.findall(r"`(\w+)`", first), [value.strip() for value in second.split(",")]
        values = values * len(names) if len(values) == 1 else values  # one value is that of each name
        stated |= {n: None if v == "none" else float(v) for n, v in zip(names, values, strict=True)}
    defaults = {field.name: getattr(Sampling(), field.name) or None for field in fields(Sampling)}
    assert {name: value or None for name, value in stated.items()} == defaults

"""The examples of docs/requests.md run, one after the other, as they are written."""

from __future__ import annotations

import re
from pathlib import Path

from tp_runtime.model import PatchedModel

PAGE = Path(__file__).parents[3] / "docs" / "requests.md"


def test_every_example_of_the_page_runs(tiny_llama_export: Path) -> None:
    names: dict[str, object] = {"model": PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)}
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)


def test_the_page_names_every_setting_with_its_default() -> None:
    from dataclasses import fields

    from tp_runtime.generation import Sampling

    rows = PAGE.read_text(encoding="utf-8").split("| --- | --- | --- |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", rows)) - {"seed"} >= {field.name for field in fields(Sampling)} - {"seed"}

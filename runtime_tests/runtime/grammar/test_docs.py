"""The examples of docs/structured-output.md run, and what they write is as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from runtime_tests.pages import page, run_examples
from tp_runtime.grammar.keywords import REFUSED
from tp_runtime.model import PatchedModel

PAGE = "structured-output.md"


def test_every_example_of_the_page_runs(tiny_llama_export: Path) -> None:
    names: dict[str, Any] = {"model": PatchedModel.from_pretrained(tiny_llama_export, "cpu")}
    assert list(run_examples(PAGE, names))
    assert names["result"].finish_reason == "eos"
    value = json.loads(names["result"].text)
    assert value["city"] in ("Kyiv", "Lagos", "Lima") and 0 <= value["people"] <= 99
    assert re.fullmatch("[A-Z]{2}-[0-9]{3}", names["code"])
    assert all(re.fullmatch(r"do [a-z]{1,8}\((true|false)\)", call) for call in names["calls"])


def test_the_page_names_what_applications_use_most_of_what_is_refused() -> None:
    refused = page(PAGE).split("## What is refused")[1]
    common = {"not", "if", "then", "else", "uniqueItems", "contains", "propertyNames", "dependentSchemas"}
    assert common <= REFUSED.keys() and all(f"`{keyword}`" in refused for keyword in common)

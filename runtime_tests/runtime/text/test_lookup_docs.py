"""The example of lookup decoding in docs/serving.md runs as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime_tests.pages import examples, page
from tp_runtime.model import PatchedModel


def test_the_example_runs_and_gives_the_text_without_lookup(tiny_llama_export: Path) -> None:
    (example,) = examples(page("serving.md").split("## Lookup decoding\n")[1].split("\n## ")[0])
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)
    names: dict[str, Any] = {"model": model}
    exec(example, names)
    asked = f"Write this letter again, with Wednesday instead of Monday: {names['letter']}"
    assert names["result"].token_ids == model.complete(asked).token_ids
    assert 0 <= names["result"].usage.copied_tokens < len(names["result"].token_ids)

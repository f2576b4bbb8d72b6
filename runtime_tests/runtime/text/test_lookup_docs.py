"""The example of lookup decoding in docs/serving.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tp_runtime.model import PatchedModel

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


def test_the_example_runs_and_gives_the_text_without_lookup(tiny_llama_export: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Lookup decoding\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)
    names: dict[str, Any] = {"model": model}
    exec(example, names)
    asked = f"Write this letter again, with Wednesday instead of Monday: {names['letter']}"
    assert names["result"].token_ids == model.complete(asked).token_ids
    assert 0 <= names["result"].usage.copied_tokens < len(names["result"].token_ids)

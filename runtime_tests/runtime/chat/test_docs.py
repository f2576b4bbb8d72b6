"""The examples of docs/chat.md run, one after the other, as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

PAGE = Path(__file__).parents[3] / "docs" / "chat.md"


def test_every_example_of_the_page_runs(
    model: PatchedModel, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.load_patch(patch, "pirate")
    model.load_patch(-1 * patch, "parrot")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 7
    names: dict[str, object] = {"model": model}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    assert (tmp_path / "chat.json").exists()

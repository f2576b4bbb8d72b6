"""The examples of docs/chat.md run, one after the other, as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_tests.pages import run_examples
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch


def test_every_example_of_the_page_runs(
    model: PatchedModel, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.load_patch(patch, "pirate")
    model.load_patch(-1 * patch, "parrot")
    names: dict[str, object] = {"model": model}
    assert len(list(run_examples("chat.md", names))) >= 7
    assert (tmp_path / "chat.json").exists()

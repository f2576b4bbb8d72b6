"""The examples of docs/absorb.md run, one after the other, as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_tests.pages import run_examples
from runtime_tests.patches import patch_for
from tp_runtime.model import PatchedModel


def test_every_example_of_the_page_runs(
    tiny_llama_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=1 << 26)
    model.load_patch(patch_for(model.graph.folder, seed=1), "pirate")
    names: dict[str, object] = {"model": model, "path": tiny_llama_export, "PatchedModel": PatchedModel}
    assert len(list(run_examples("absorb.md", names))) == 4
    other = names["other"]
    assert isinstance(other, PatchedModel) and other.prefix_cache is not None and other.prefix_cache.entries > 0

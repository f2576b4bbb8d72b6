"""The edge half against transformers and torch: patches exported as defaults, or baked in when the model is opened.

The tests are those of the edge half, on fresh exports, with the logits of torch for what they must find.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest
from runtime_tests.patches import patch_for
from runtime_tests.runtime.session.test_defaults import (
    IDS,
    other,
    test_a_batch_mixes_the_default_patch_with_others,
    test_a_cache_knows_the_default_patch,
    test_a_patch_baked_in_is_the_patch_bound,
    test_a_patch_of_strength_zero_bakes_in_the_base,
    test_opened_without_the_patch_it_is_the_base,
    test_plain_onnxruntime_computes_the_patched_model,
    test_the_folder_says_what_its_defaults_are,
    test_the_runtime_starts_patched_and_finds_back_to_the_base,
)
from tp_export.graph import export_model
from tp_export.source import load_model, open_source
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import ModelFolder

__all__ = [  # collected by being here
    "other",
    "test_a_batch_mixes_the_default_patch_with_others",
    "test_a_cache_knows_the_default_patch",
    "test_a_patch_baked_in_is_the_patch_bound",
    "test_a_patch_of_strength_zero_bakes_in_the_base",
    "test_opened_without_the_patch_it_is_the_base",
    "test_plain_onnxruntime_computes_the_patched_model",
    "test_the_folder_says_what_its_defaults_are",
    "test_the_runtime_starts_patched_and_finds_back_to_the_base",
]


@pytest.fixture(scope="module")
def patch(tiny_llama_export: Path) -> Patch:
    """A pair in layer 0, a bias alone in layer 2, nothing in layer 1."""
    whole = patch_for(ModelFolder.open(tiny_llama_export), seed=1, scale=0.3)
    bias = whole.deltas[2, "mlp_out"].bias
    return Patch({(0, "mlp_out"): whole.deltas[0, "mlp_out"], (2, "mlp_out"): Delta(bias=bias)}, whole.config)


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llama, exported with `patch` as its default."""
    return export_model(open_source(tiny_llama), tmp_path_factory.mktemp("export") / "patched", patch=patch)


@pytest.fixture(scope="module")
def wanted(tiny_llama: Path, patch: Patch, other: Patch) -> dict[str, Any]:
    """Logits by torch."""
    model = load_model(open_source(tiny_llama))
    found = {name: torch_logits(model, IDS, p) for name, p in {"base": None, "patch": patch, "other": other}.items()}
    assert min(furthest(found["base"], found[name]) for name in ("patch", "other")) > 0.1
    assert furthest(found["patch"], found["other"]) > 0.1
    return found

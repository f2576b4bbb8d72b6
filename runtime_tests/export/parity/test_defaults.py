"""The edge half compared with torch: patches exported as defaults, or made the defaults when the model is opened.

These are the tests of the edge half, run on new exports; the expected logits are those of torch.
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
    test_a_cache_of_the_default_patch_is_accepted,
    test_a_folder_opened_without_its_default_patch_is_the_base,
    test_a_patch_of_strength_zero_sets_the_base_as_default,
    test_a_patch_set_as_default_equals_the_patch_bound,
    test_plain_onnxruntime_computes_the_patched_model,
    test_the_folder_describes_its_default_patch,
    test_the_runtime_starts_with_the_default_patch_and_can_return_to_the_base,
)
from tp_export.graph import export_model
from tp_export.source import load_model, open_source
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import ModelFolder

__all__ = [  # pytest collects these tests and fixtures by their names here
    "other",
    "test_a_batch_mixes_the_default_patch_with_others",
    "test_a_cache_of_the_default_patch_is_accepted",
    "test_a_folder_opened_without_its_default_patch_is_the_base",
    "test_a_patch_of_strength_zero_sets_the_base_as_default",
    "test_a_patch_set_as_default_equals_the_patch_bound",
    "test_plain_onnxruntime_computes_the_patched_model",
    "test_the_folder_describes_its_default_patch",
    "test_the_runtime_starts_with_the_default_patch_and_can_return_to_the_base",
]


@pytest.fixture(scope="module")
def patch(tiny_llama_export: Path) -> Patch:
    """A low-rank pair in layer 0, only a bias in layer 2, nothing in layer 1."""
    whole = patch_for(ModelFolder.open(tiny_llama_export), seed=1, scale=0.3)
    bias = whole.deltas[2, "mlp_out"].bias
    return Patch({(0, "mlp_out"): whole.deltas[0, "mlp_out"], (2, "mlp_out"): Delta(bias=bias)}, whole.config)


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llama, exported with `patch` as its default."""
    return export_model(open_source(tiny_llama), tmp_path_factory.mktemp("export") / "patched", patch=patch)


@pytest.fixture(scope="module")
def wanted(tiny_llama: Path, patch: Patch, other: Patch) -> dict[str, Any]:
    """The logits of torch with each patch, by the name of the patch."""
    model = load_model(open_source(tiny_llama))
    found = {name: torch_logits(model, IDS, p) for name, p in {"base": None, "patch": patch, "other": other}.items()}
    assert min(furthest(found["base"], found[name]) for name in ("patch", "other")) > 0.1
    assert furthest(found["patch"], found["other"]) > 0.1
    return found

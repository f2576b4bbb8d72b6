"""Patches that need no binding: exported as the slots' defaults, or made the defaults when the model is opened.

The expected logits are those of the plain export with the patches bound. runtime_tests/export/parity/test_defaults.py
runs the same tests on new exports and compares them with the logits of torch.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.logits import furthest, graph_logits, plain_session_logits, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import ModelFormatError, PatchTargetError, PatchValueError, StaleCacheError
from tp_runtime.generation import Batch, Sampler, generate
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE, Graph, ModelFolder, describe_files

IDS = token_ids(30)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported(tiny_llama_patched: Path) -> Path:
    """Tiny Llama, exported with `patch` as its default."""
    return tiny_llama_patched


@pytest.fixture(scope="module")
def patch(exported: Path) -> Patch:
    """A low-rank pair in layer 0, only a bias in layer 2, nothing in layer 1."""
    return Patch.load(exported / DEFAULT_FILE)


@pytest.fixture(scope="module")
def other(tiny_llama_export: Path) -> Patch:
    """A patch that acts only in layer 1, where `patch` does not act."""
    whole = patch_for(ModelFolder.open(tiny_llama_export), seed=2, rank=9, scale=0.3)
    return Patch({(1, "mlp_out"): whole.deltas[1, "mlp_out"]}, whole.config)


@pytest.fixture(scope="module")
def wanted(tiny_llama_export: Path, patch: Patch, other: Patch) -> dict[str, Any]:
    """The logits of the plain export with each patch bound, by the name of the patch."""
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    patches = {"base": None, "patch": patch, "other": other}
    found = {name: graph_logits(graph, IDS, graph.bind(chosen)) for name, chosen in patches.items()}
    assert min(furthest(found["base"], found[name]) for name in ("patch", "other")) > 0.1
    assert furthest(found["patch"], found["other"]) > 0.1
    return found


# -- the exported folder -------------------------------------------------------------------------------------


def test_the_folder_describes_its_default_patch(exported: Path, patch: Patch, tiny_llama_export: Path) -> None:
    folder, plain = ModelFolder.open(exported), ModelFolder.open(tiny_llama_export)
    assert "patch.onnx_data" in folder.files and (exported / "patch.onnx_data").stat().st_size >= patch.nbytes / 2
    assert folder.default_patch is not None and folder.default_patch.identity == patch.identity
    assert folder.default_patch.terms == patch.terms and folder.default_patch.name == patch.name
    assert folder.base_digest == plain.base_digest and folder.graph_digest != plain.graph_digest
    assert plain.default_patch is None and "patch.onnx_data" not in plain.files
    # The weights are those of the plain export, because the patch is in a separate file.
    assert folder.files["model.onnx_data"] == plain.files["model.onnx_data"]


def test_plain_onnxruntime_computes_the_patched_model(
    exported: Path, tiny_llama_export: Path, wanted: dict[str, Any]
) -> None:
    assert furthest(plain_session_logits(exported, IDS)[0], wanted["patch"]) < TOLERANCE
    assert furthest(plain_session_logits(tiny_llama_export, IDS)[0], wanted["base"]) < TOLERANCE


def test_the_runtime_starts_with_the_default_patch_and_can_return_to_the_base(
    exported: Path, tiny_llama_export: Path, wanted: dict[str, Any], patch: Patch, other: Patch
) -> None:
    base = PatchedModel.from_pretrained(tiny_llama_export, "cpu").logits(IDS)
    model = PatchedModel.from_pretrained(exported, "cpu")
    active = model.logits(IDS)
    assert furthest(active, wanted["patch"]) < TOLERANCE
    assert np.array_equal(active, model.logits(IDS, patch))
    assert np.array_equal(model.logits(IDS, None), base)
    assert np.array_equal(model.logits(IDS, patch, 0), base)
    assert model.graph.bind(0 * patch) is model.graph.base  # nothing is bound again
    assert furthest(model.logits(IDS, other), wanted["other"]) < TOLERANCE
    model.load_patch(other, "other")
    with model.patched("other"):
        assert furthest(model.logits(IDS), wanted["other"]) < TOLERANCE
        with model.patched(None):
            assert np.array_equal(model.logits(IDS), base)
    model.unload_patch("other")
    assert np.array_equal(model.logits(IDS), active)


def test_a_folder_opened_without_its_default_patch_is_the_base(
    exported: Path, tiny_llama_export: Path, wanted: dict[str, Any], patch: Patch
) -> None:
    model = PatchedModel.from_pretrained(exported, "cpu", patch=None)
    assert np.array_equal(model.logits(IDS), PatchedModel.from_pretrained(tiny_llama_export, "cpu").logits(IDS))
    assert furthest(model.logits(IDS, patch), wanted["patch"]) < TOLERANCE
    with pytest.raises(StaleCacheError):
        model.stream("Hi", cache=model.new_cache(patch))


def test_a_cache_of_the_default_patch_is_accepted(exported: Path, patch: Patch) -> None:
    model = PatchedModel.from_pretrained(exported, "cpu")
    assert model.generate("Hi", cache=model.new_cache(patch), max_new_tokens=3) == model.generate(
        "Hi", max_new_tokens=3
    )
    for foreign in (None, 0.5 * patch):
        with pytest.raises(StaleCacheError):
            model.stream("Hi", cache=model.new_cache(foreign))


def test_a_batch_mixes_the_default_patch_with_others(exported: Path, patch: Patch, other: Patch) -> None:
    """A session does not expose its initializers, so the default patch is read from the patch file in the folder."""
    graph = Graph(ModelFolder.open(exported), "cpu")
    bounds = [graph.default, graph.base, graph.bind(other)]
    batch = Batch(graph, 3)
    options: dict[str, Any] = {"sampler": Sampler(), "max_new_tokens": 4, "eos_ids": frozenset()}
    rows = [batch.join(IDS[:10], bound, **options) for bound in bounds]
    while batch.rows or batch.joining:
        batch.step()
    for row, bound in zip(rows, bounds, strict=True):
        assert row.tokens[10:] == list(generate(graph, IDS[:10], bound, **options))
    assert len({tuple(row.tokens) for row in rows}) > 1


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_a_patch_file_that_is_missing_or_replaced_is_refused(
    exported: Path, tmp_path: Path, patch: Patch, other: Patch, damage: str
) -> None:
    folder = ModelFolder.open(shutil.copytree(exported, tmp_path / "m"))
    if damage == "missing":
        folder = replace(folder, files={name: record for name, record in folder.files.items() if name != DEFAULT_FILE})
    else:
        other.save(folder.path / DEFAULT_FILE)
        listed = describe_files(folder.path, [DEFAULT_FILE])  # as if the export had listed it
        folder = replace(folder, files={**folder.files, **listed})
    with pytest.raises(ModelFormatError, match="default patch"):
        Graph(folder, "cpu")


# -- defaults set at load time -------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["tiny_llama_export", "exported"])
def test_a_patch_set_as_default_equals_the_patch_bound(
    request: pytest.FixtureRequest, folder: str, wanted: dict[str, Any], patch: Patch, other: Patch, tmp_path: Path
) -> None:
    path = request.getfixturevalue(folder)
    per_request = PatchedModel.from_pretrained(path, "cpu", patch=None)
    other.save(tmp_path / "other.safetensors", "f32")
    for default in (other, tmp_path / "other.safetensors"):
        model = PatchedModel.from_pretrained(path, "cpu", patch=default)
        assert furthest(model.logits(IDS), wanted["other"]) < TOLERANCE
        assert furthest(model.logits(IDS), per_request.logits(IDS, other)) < 1e-6
        # Requests with the default patch bind nothing, and every other choice still works.
        assert model.graph.bind(other).values == {}
        assert furthest(model.logits(IDS, patch), wanted["patch"]) < TOLERANCE
        assert np.array_equal(model.logits(IDS, None), per_request.logits(IDS))
        assert furthest(model.logits(IDS, 0.5 * other), per_request.logits(IDS, 0.5 * other)) < 1e-6
        with model.patched(patch):
            assert furthest(model.logits(IDS), wanted["patch"]) < TOLERANCE
        assert furthest(model.logits(IDS), wanted["other"]) < TOLERANCE


def test_a_patch_of_strength_zero_sets_the_base_as_default(
    exported: Path, patch: Patch, wanted: dict[str, Any]
) -> None:
    model = PatchedModel.from_pretrained(exported, "cpu", patch=0 * patch)
    assert furthest(model.logits(IDS), wanted["base"]) < TOLERANCE
    assert furthest(model.logits(IDS, patch), wanted["patch"]) < TOLERANCE


def test_the_session_outlives_the_patch_it_was_opened_with(tiny_llama_export: Path) -> None:
    """ONNX Runtime reads the default patch in place, so its memory must not be freed with the caller's object."""
    folder = ModelFolder.open(tiny_llama_export)
    graph = Graph(folder, "cpu", defaults=patch_for(folder, seed=3))
    first = graph_logits(graph, IDS, graph.default)
    reused_memory = [np.full((1 << 12,), np.nan, np.float32) for _ in range(500)]
    assert np.array_equal(graph_logits(graph, IDS, graph.default), first) and len(reused_memory) == 500
    assert furthest(first, graph_logits(graph, IDS, graph.bind(patch_for(folder, seed=3)))) < 1e-6


@pytest.mark.parametrize("at_load", [False, True], ids=["at export", "at load"])
def test_the_default_patch_takes_a_strength(
    exported: Path, tiny_llama_export: Path, patch: Patch, wanted: dict[str, Any], at_load: bool
) -> None:
    plain = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    if at_load:
        model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=patch)
    else:
        model = PatchedModel.from_pretrained(exported, "cpu")
    for strength in (0.5, -2.0, 0.0):
        assert furthest(model.logits(IDS, strength=strength), plain.logits(IDS, strength * patch)) < 1e-6
    assert model.generate("Hi", strength=0.5, max_new_tokens=4) == plain.generate(
        "Hi", patch=0.5 * patch, max_new_tokens=4
    )
    assert model.generate(["Hi", "Ho"], strength=[1.0, 0.5], max_new_tokens=4) == plain.generate(
        ["Hi", "Ho"], patch=[patch, 0.5 * patch], max_new_tokens=4
    )
    # A strength of 1 binds nothing, a cache belongs to its strength, and the default stays what it was.
    assert model.new_cache(strength=1.0).key == model.graph.default.key
    with pytest.raises(StaleCacheError):
        model.stream("Hi", cache=model.new_cache(strength=0.5))
    assert furthest(model.logits(IDS), wanted["patch"]) < TOLERANCE


def test_the_default_patch_takes_a_strength_that_makes_up_for_its_own(exported: Path, patch: Patch) -> None:
    model = PatchedModel.from_pretrained(exported, "cpu", patch=0.1 * patch)
    assert np.array_equal(
        model.logits(IDS, strength=10), PatchedModel.from_pretrained(exported, "cpu").logits(IDS, patch)
    )


def test_a_default_patch_with_a_kv_prefix_takes_no_strength_but_0_and_1(tiny_llama_export: Path) -> None:
    folder = ModelFolder.open(tiny_llama_export)
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=with_prefix(patch_for(folder), folder, [1, 2]))
    with pytest.raises(PatchValueError, match="strength 0 or 1"):
        model.logits([1, 2, 3], strength=0.5)
    assert np.array_equal(model.logits([1, 2, 3], strength=0), model.logits([1, 2, 3], None))


def test_a_strength_needs_a_patch(tiny_llama_export: Path, exported: Path, patch: Patch) -> None:
    for path, choice in ((tiny_llama_export, None), (exported, None), (exported, 0 * patch)):
        with pytest.raises(PatchTargetError, match="strength"):
            PatchedModel.from_pretrained(path, "cpu", patch=choice).logits(IDS, strength=0.5)

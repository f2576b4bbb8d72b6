"""KV prefixes: the entries of a cached prompt replace it, a file stores them, and misfits and misuse are refused.

The entries are random if their values do not matter. The tests in runtime_tests/export/parity compare the entries that
the exporter chooses with torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.cli import Cli
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import (
    PatchFormatError,
    PatchShapeError,
    PatchValueError,
    RequestError,
    StaleCacheError,
)
from tp_runtime.model import PatchedModel
from tp_runtime.patch import ENTRIES_STAND, KV_PARTS, KVPrefix, Patch
from tp_runtime.patch.kv_prefix import prefix_from
from tp_runtime.session import probe

CONTEXT = "Always talk like a pirate, and mention the sea in every single answer."
QUERIES = ("Is tea better than coffee?", "How far is the moon?", "Why?")


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> PatchedModel:
    return PatchedModel.from_pretrained(request.getfixturevalue(f"tiny_{request.param}_export"), device="cpu")


def leads(model: PatchedModel) -> tuple[list[int], list[int]]:
    """Return the leading ids of a prompt with CONTEXT and without it, up to the suffix that both prompts share."""
    prompted, plain = model.codec.render(QUERIES[0], CONTEXT), model.codec.render(QUERIES[0])
    while prompted and plain and prompted[-1] == plain[-1]:
        del prompted[-1], plain[-1]
    return prompted, plain


def cached(model: PatchedModel) -> Patch:
    """Return a patch that has no deltas, and a KV prefix that is the cache of CONTEXT."""
    prompted, plain = leads(model)
    cache = model.graph.new_cache(model.graph.base)
    model.graph.forward(prompted, cache, model.graph.base)
    entries = {
        (layer, part): model.graph.kv.content(cache, f"past_key_values.{layer}.{part}")[0].transpose(1, 0, 2)
        for layer in range(model.graph.folder.layers)
        for part in KV_PARTS
    }
    config = replace(patch_for(model.graph.folder).config, method="prefix")
    return Patch({}, config, KVPrefix(entries, tuple(plain), len(prompted)))


def prefixed(model: PatchedModel, entries: int, patch: Patch | None = None) -> Patch:
    """Return `patch`, or a patch without deltas, with random entries that replace the same ids as CONTEXT's cache."""
    patch = patch or Patch({}, replace(patch_for(model.graph.folder, seed=1).config, method="prefix"))
    prompted, plain = leads(model)
    return with_prefix(patch, model.graph.folder, plain, entries, len(prompted))


def test_the_entries_of_a_cached_prompt_replace_it(model: PatchedModel) -> None:
    whole = cached(model)
    assert whole.prefix is not None
    for query in QUERIES:
        wanted = model.logits(model.codec.render(query, CONTEXT), patch=None)[whole.prefix.position :]
        assert furthest(model.logits(model.codec.render(query), patch=whole), wanted) < 1e-4
        without = model.logits(model.codec.render(query), patch=None)
        assert furthest(without[-len(wanted) :], wanted) > 0.1  # otherwise the context has no effect


def test_a_prefix_gives_the_same_logits_on_a_growing_and_on_a_rewound_cache(model: PatchedModel) -> None:
    patch = prefixed(model, 5, patch_for(model.graph.folder, seed=2, scale=0.2))
    assert patch.prefix is not None and patch.prefix.longest == 5
    ids, lead = model.codec.render(QUERIES[0]), len(patch.prefix.replaces)
    wanted = model.logits(ids, patch=patch)
    bound = model.graph.bind(patch)
    cache = model.graph.new_cache(bound)
    for _ in range(2):
        kept = cache.keep_prefix(ids)
        rows = [model.graph.forward([token], cache, bound)[0] for token in ids[kept:]]
        assert furthest(np.stack(rows), wanted[-len(rows) :]) < 1e-4
        del cache.tokens[lead + 3 :]


def test_generation_uses_the_prefix_and_can_continue_on_a_cache(model: PatchedModel) -> None:
    patch = cached(model)
    prompted = list(model.stream("Hello", system=CONTEXT, patch=None, max_new_tokens=6))
    cache = model.new_cache(patch=patch)
    assert list(model.stream("Hello", patch=patch, max_new_tokens=6, cache=cache)) == prompted
    # The second request rewinds the cache.
    assert list(model.stream("Hello", patch=patch, max_new_tokens=6, cache=cache)) == prompted
    with pytest.raises(StaleCacheError):
        model.generate("Hello", patch=None, cache=cache)


def test_a_prompt_that_does_not_start_with_the_replaced_ids_is_refused(model: PatchedModel) -> None:
    patch = prefixed(model, 3)
    assert patch.prefix is not None
    with pytest.raises(RequestError, match=ENTRIES_STAND):
        model.generate("Hello", system="Be brief.", patch=patch)
    if model.codec.style == "chat":
        with pytest.raises(RequestError, match=ENTRIES_STAND):
            model.generate([{"role": "system", "content": "No."}, {"role": "user", "content": "Hi"}], patch=patch)
        with pytest.raises(RequestError, match="does not start as the patch"):
            model.generate("Hello", raw=True, patch=patch)
    with pytest.raises(RequestError, match="at least one more"):
        model.logits(patch.prefix.replaces, patch=patch)
    room = model.graph.folder.context_window - patch.prefix.position
    ids = [*patch.prefix.replaces, *token_ids(room + 1)]
    with pytest.raises(RequestError, match="context window"):
        model.logits(ids, patch=patch)


def test_a_file_stores_the_prefix(model: PatchedModel, tmp_path: Path) -> None:
    patch = prefixed(model, 4, patch_for(model.graph.folder, seed=3))
    patch.save(tmp_path / "p.safetensors", "f32")
    again = Patch.load(tmp_path / "p.safetensors")
    assert again.identity == patch.identity and again.prefix is not None and patch.prefix is not None
    assert (again.prefix.replaces, again.prefix.position) == (patch.prefix.replaces, patch.prefix.position)
    prefix_only = Patch({}, replace(patch.config, method="prefix"), patch.prefix)
    prefix_only.save(tmp_path / "prefix.safetensors")
    assert Patch.load(tmp_path / "prefix.safetensors").deltas == {}
    moved = Patch(patch.deltas, patch.config, replace(patch.prefix, position=patch.prefix.position + 1))
    assert moved.identity != patch.identity  # the same tensors at another position are another patch


def test_sums_and_strengths_of_patches_with_a_prefix(model: PatchedModel) -> None:
    pure = patch_for(model.graph.folder, seed=4)
    patch = prefixed(model, 4, pure)
    assert (pure + patch).prefix is patch.prefix and (patch + pure).prefix is patch.prefix
    assert 1 * patch is patch and (0 * patch).terms == () and patch.truncate(1).prefix is patch.prefix
    with pytest.raises(PatchValueError, match="strength 0 or 1"):
        0.5 * patch
    with pytest.raises(
        PatchValueError, match="both patches have entries, and a patch with entries adds with weights only"
    ):
        patch + patch


def arrays(entries: int = 3, layers: int = 2, heads: int = 2, head_dim: int = 4) -> dict[tuple[int, str], Any]:
    rng = np.random.default_rng(0)
    names = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    return {name: rng.normal(size=(entries, heads, head_dim)).astype(np.float32) for name in names}


def test_prefixes_that_do_not_fit_are_refused(model: PatchedModel) -> None:
    with pytest.raises(PatchShapeError, match=r"does not fit the model's cache.*2 heads of 4"):
        model.logits([1, 2], patch=Patch({}, patch_for(model.graph.folder).config, KVPrefix(arrays(), (1,), 5)))
    with pytest.raises(PatchShapeError, match="lacks a layer"):
        KVPrefix({key: value for key, value in arrays().items() if key != (0, "value")}, (1,), 5)
    for shape in ((3, 4, 2), (3, 2), (3, 2, 4, 1), (), (0, 2, 4)):
        with pytest.raises(PatchShapeError, match=r"prefix\.1\.key.*at least one entry"):
            KVPrefix({**arrays(), (1, "key"): np.zeros(shape), (1, "value"): np.zeros(shape)}, (1,), 5)
    with pytest.raises(PatchShapeError, match=r"prefix\.1\.value.*\[2, 2, 4\], as the keys"):
        KVPrefix({**arrays(), (1, "key"): np.zeros((2, 2, 4))}, (1,), 5)
    with pytest.raises(PatchValueError, match="NaN"):
        KVPrefix({**arrays(), (1, "key"): np.full((3, 2, 4), np.nan)}, (1,), 5)
    with pytest.raises(PatchValueError, match="position"):
        KVPrefix(arrays(), (1,), 2)
    longer = {**arrays(), **{(1, part): np.zeros((6, 2, 4)) for part in KV_PARTS}}
    with pytest.raises(PatchValueError, match="at least 6, the largest number of entries"):
        KVPrefix(longer, (1,), 5)


def test_each_layer_may_have_its_own_number_of_entries() -> None:
    prefix = KVPrefix({**arrays(), **{(1, part): np.zeros((6, 2, 4)) for part in KV_PARTS}}, (1,), 6)
    assert (prefix.counts, prefix.longest, prefix.amount) == ((3, 6), 6, "3 to 6")
    same = KVPrefix(arrays(), (1,), 6)
    assert (same.counts, same.longest, same.amount) == ((3, 3), 3, "3")


def test_prefixes_of_another_model_are_refused_when_bound(model: PatchedModel) -> None:
    patch = prefixed(model, 3)
    assert patch.prefix is not None
    far, foreign = replace(patch.prefix, position=10**9), replace(patch.prefix, replaces=(10**6,))
    for prefix, error in ((far, PatchShapeError), (foreign, PatchValueError)):
        with pytest.raises(error, match=r"config\.prefix"):
            model.load_patch(Patch({}, patch.config, prefix))
    huge = {entry: np.full_like(values, 1e5) for entry, values in patch.prefix.entries.items()}
    with pytest.raises(PatchValueError, match="does not fit the cache's precision"):
        replace(patch.prefix, entries=huge).check_dtype(np.float16)


def test_a_probe_of_another_patch_is_refused(model: PatchedModel) -> None:
    patch = prefixed(model, 3)
    assert patch.prefix is not None
    ids = model.codec.render(QUERIES[0])
    logits = model.logits(ids, patch=patch)
    right = replace(patch, config=replace(patch.config, probe=probe.measure_probe(ids, logits)))
    assert model.check(right).ok
    for wrong in (
        probe.measure_probe(ids[1:], logits),
        {**probe.measure_probe(ids, logits), "token_ids": ids[: len(logits)]},
        probe.measure_probe(ids, logits[1:]),
    ):
        with pytest.raises(PatchFormatError, match=r"config\.probe"):
            model.check(replace(patch, config=replace(patch.config, probe=wrong)))


@pytest.mark.parametrize(
    "description",
    [None, {}, {"replaces": [1]}, {"replaces": [1.5], "position": 4}, {"replaces": [1], "position": -1}, [1], "x"],
)
def test_an_incomplete_description_is_refused(description: Any) -> None:
    with pytest.raises(PatchFormatError, match=r"config\.prefix"):
        prefix_from(arrays(), description)


def test_a_description_without_tensors_is_refused() -> None:
    assert prefix_from({}, None) is None
    with pytest.raises(PatchFormatError, match="0 tensors"):
        prefix_from({}, {"replaces": [1], "position": 4})


@pytest.mark.parametrize("weights", [False, True])
def test_the_commands_accept_a_patch_with_a_prefix(
    weights: bool, model: PatchedModel, tmp_path: Path, cli: Cli
) -> None:
    patch = prefixed(model, 5, patch_for(model.graph.folder, seed=5) if weights else None)
    file, folder = tmp_path / "p.safetensors", model.graph.folder.path
    patch.save(file)
    shown = cli("inspect", file)
    assert "5 entries for each head" in shown.out and ("no weights" in shown.out) is not weights
    assert cli("inspect", file, "--json").json["prefix"]["entries"] == 5
    stored = Patch.load(file)
    text = cli("generate", folder, "Hello", "--patch", file, "--max-new-tokens", "4", "--json").json["text"]
    assert text == model.generate("Hello", patch=stored, max_new_tokens=4)
    report = cli(
        "bench", folder, "--patch", file, "--tokens", "2", "--prompt-tokens", "2", "--rounds", "1", "--json"
    ).json
    assert report["token_ratio"] > 0 and report["switch_ms"] > 0
    opened = PatchedModel.from_pretrained(folder, device="cpu", patch=stored)
    assert opened.generate("Hello", max_new_tokens=4) == text
    with model.patched(stored):
        assert model.generate("Hello", max_new_tokens=4) == text

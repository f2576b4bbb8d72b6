"""The exported graph in a session: the base, patches, caches and switching.

The tests in runtime_tests/export/parity compare its logits with those of torch. runtime_tests/runtime/test_fixtures.py
compares them with the figures of torch that are stored with each fixture. Tiny Llama has one slot in each layer; tiny
Gemma has every slot and layers with a sliding window.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.committed import private_copy
from runtime_tests.logits import furthest, graph_logits, token_ids
from runtime_tests.patches import patch_for
from tp_runtime.errors import (
    BaseMismatchError,
    PatchError,
    PatchShapeError,
    PatchTargetError,
    RequestError,
    StaleCacheError,
)
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import Graph, ModelFolder

TOLERANCE = 1e-4
IDS = token_ids(64)
CHUNKS = {"token by token": (1,) * 64, "in chunks": (5, 1, 20, 1, 2, 35)}


@pytest.fixture(scope="module")
def gemma(tiny_gemma_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_gemma_export), "cpu")


@pytest.fixture(scope="module", params=["llama", "gemma"])
def either(request: pytest.FixtureRequest) -> Graph:
    return request.getfixturevalue({"llama": "graph", "gemma": "gemma"}[request.param])


@pytest.fixture(scope="module")
def graph(tiny_llama_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_llama_export), "cpu")


# -- logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("rank", [None, 0, 1, 4, 60])
def test_a_prompt_in_chunks_gives_the_logits_of_one_run(
    either: Graph, rank: int | None, chunks: tuple[int, ...]
) -> None:
    bound = either.bind(None if rank is None else patch_for(either.folder, seed=1, rank=rank, scale=0.2))
    assert furthest(graph_logits(either, IDS, bound, chunks), graph_logits(either, IDS, bound)) < TOLERANCE


def test_a_patch_minus_itself_is_the_base(either: Graph) -> None:
    patch = patch_for(either.folder, seed=5, rank=3, scale=0.2)
    assert furthest(graph_logits(either, IDS, either.bind(patch - patch)), graph_logits(either, IDS)) < TOLERANCE


def test_only_the_last_logits_are_returned_unless_all_are_requested(graph: Graph) -> None:
    last = graph.forward(IDS, graph.new_cache(graph.base), graph.base)
    assert last.shape == (1, graph.folder.vocab_size) and last.dtype == np.float32
    assert furthest(last, graph_logits(graph, IDS)[-1:]) < 1e-5


# -- exactly equal logits ------------------------------------------------------------------------------------


def test_binding_and_dropping_patches_does_not_change_the_base(either: Graph) -> None:
    before = graph_logits(either, IDS)
    for rank in (0, 1, 60):
        bound = either.bind(patch_for(either.folder, seed=rank, rank=rank))
        assert furthest(graph_logits(either, IDS, bound), before) > 0.1
        assert np.array_equal(graph_logits(either, IDS), before)
        del bound
        assert np.array_equal(graph_logits(either, IDS), before)


def test_a_patch_that_does_not_fit_is_refused_and_does_not_change_the_base(graph: Graph) -> None:
    before, patch = graph_logits(graph, IDS), patch_for(graph.folder)
    delta = patch.deltas[0, "mlp_out"]
    outputs = delta.b.shape[1] if delta.b is not None else 0
    bad = {
        "base": (BaseMismatchError, Patch(patch.deltas, replace(patch.config, base_digest="0" * 64))),
        "precision": (BaseMismatchError, Patch(patch.deltas, replace(patch.config, precision="int4"))),
        "layers": (PatchShapeError, Patch({**patch.deltas, (3, "mlp_out"): delta}, patch.config)),
        "site": (PatchTargetError, Patch({**patch.deltas, (2, "down"): delta}, patch.config)),
        "shape": (PatchShapeError, Patch({(2, "mlp_out"): Delta(bias=np.ones(outputs + 1))}, patch.config)),
    }
    for expected, wrong in bad.values():
        with pytest.raises(expected):
            graph.bind(wrong)
        with pytest.raises(expected):
            Graph(graph.folder, "cpu", defaults=wrong)
        assert np.array_equal(graph_logits(graph, IDS), before)


@pytest.mark.parametrize("strength", [0, 1, -2])
def test_whether_a_patch_fits_does_not_depend_on_its_strength(graph: Graph, strength: float) -> None:
    patch = patch_for(graph.folder)
    foreign = Patch(patch.deltas, replace(patch.config, base_digest="0" * 64))
    with pytest.raises(BaseMismatchError, match="base_digest"):
        graph.bind(strength * foreign)


def test_strength_zero_is_the_base(either: Graph) -> None:
    bound = either.bind(0 * patch_for(either.folder))
    assert bound.key == either.base.key
    assert np.array_equal(graph_logits(either, IDS, bound), graph_logits(either, IDS))
    cache = either.new_cache(either.base)
    either.forward(IDS[:9], cache, either.base)
    either.forward(IDS[9:], cache, bound)  # both use the same cache


def test_patches_in_concurrent_threads_do_not_interfere(either: Graph) -> None:
    bounds = [either.base, *(either.bind(patch_for(either.folder, seed=rank, rank=rank)) for rank in (1, 7))]
    steps = (24, *(1,) * 40)
    single = [graph_logits(either, IDS, bound, steps) for bound in bounds]
    assert furthest(single[1], single[2]) > 0.1
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            together = list(pool.map(lambda bound: graph_logits(either, IDS, bound, steps), bounds))
            for one, other in zip(single, together, strict=True):
                assert np.array_equal(one, other)


# -- caches --------------------------------------------------------------------------------------------------


def test_a_growing_cache_gives_the_logits_of_one_run(either: Graph) -> None:
    ids = token_ids(330, seed=4)
    bound = either.bind(patch_for(either.folder, seed=4, scale=0.2))
    wanted = graph_logits(either, ids, bound)
    for chunks in ((250, *(1,) * 16, 64), (256, 74), (1, 329)):
        assert furthest(graph_logits(either, ids, bound, chunks), wanted) < TOLERANCE


def test_a_cache_can_fill_the_context_window_but_not_exceed_it(graph: Graph) -> None:
    ids = token_ids(graph.folder.context_window, seed=5)
    cache = graph.new_cache(graph.base)
    graph.forward(ids[:-1], cache, graph.base)
    graph.forward(ids[-1:], cache, graph.base)
    with pytest.raises(RequestError, match="context window"):
        graph.forward([1], cache, graph.base)
    assert len(cache) == len(ids)


def test_a_cache_that_cannot_grow_is_still_usable(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(330, seed=6)
    wanted = graph_logits(graph, ids)
    cache = graph.new_cache(graph.base)
    graph.forward(ids[:200], cache, graph.base)
    allocate, allowed = graph.kv._value, iter(range(3))

    def out_of_memory(*args: Any) -> Any:
        if next(allowed, None) is None:
            raise MemoryError
        return allocate(*args)

    monkeypatch.setattr(graph.kv, "_value", out_of_memory)
    with pytest.raises(MemoryError):
        graph.forward(ids[200:], cache, graph.base)
    monkeypatch.undo()
    assert cache.tokens == ids[:200]
    graph.forward(ids[200:250], cache, graph.base)  # the old buffers still have room for these
    assert furthest(graph.forward(ids[250:], cache, graph.base, all_logits=True), wanted[250:]) < 1e-5


def test_a_rewound_cache_behaves_as_if_the_rest_had_never_been_run(either: Graph) -> None:
    bound = either.bind(patch_for(either.folder, seed=7))
    cache = either.new_cache(bound)
    either.forward(token_ids(300, seed=8), cache, bound)
    for kept in (200, 40, 0):
        ids = [*cache.tokens[:kept], *token_ids(30, seed=kept + 1)]
        common = cache.keep_prefix(ids)
        assert kept <= common < kept + 3
        got = either.forward(ids[common:], cache, bound, all_logits=True)
        assert cache.tokens == ids
        assert furthest(got, graph_logits(either, ids, bound)[common:]) < 1e-5


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-optimum", "tiny-gemma", "tiny-llama-int4"])
def test_a_run_returns_the_logits_of_as_many_of_its_last_tokens_as_are_asked_for(name: str, tmp_path: Path) -> None:
    graph = Graph(ModelFolder.open(private_copy(name, tmp_path)), "cpu", threads=1)
    cache = graph.new_cache(graph.base)
    graph.forward(IDS[:20], cache, graph.base)
    for ids in (IDS[20:32], IDS[20:21]):  # the second one is a decode step
        every = graph.forward(ids, cache, graph.base, all_logits=True)
        for last in (1, 2, 7, 11, 12, 40):
            del cache.tokens[20:]
            got = graph.forward(ids, cache, graph.base, last=last)
            assert len(got) == min(last, len(ids))
            assert np.array_equal(got, every[-last:])
        del cache.tokens[20:]


@pytest.mark.parametrize("last", [0, -1, 1.5, None, "3"])
def test_a_number_of_logits_that_is_not_positive_is_refused(graph: Graph, last: Any) -> None:
    cache = graph.new_cache(graph.base)
    with pytest.raises(RequestError) as error:
        graph.forward(IDS[:4], cache, graph.base, last=last)
    assert error.value.field == "last" and not cache.tokens


def test_returned_logits_do_not_change_afterwards(graph: Graph) -> None:
    cache = graph.new_cache(graph.base)
    first = graph.forward(IDS[:4], cache, graph.base, all_logits=True)
    copy = first.copy()
    for token in IDS[4:40]:
        graph.forward([token], cache, graph.base)
    assert np.array_equal(first, copy)


def test_logits_without_a_copy_are_equal_and_are_overwritten_by_the_next_run(graph: Graph) -> None:
    copied, shared = graph.new_cache(graph.base), graph.new_cache(graph.base)
    for tokens in ([1, 2, 3], [4], [5]):
        wanted = graph.forward(tokens, copied, graph.base)
        got = graph.forward(tokens, shared, graph.base, copy=False)
        np.testing.assert_array_equal(got, wanted)
    graph.forward([6], shared, graph.base, copy=False)
    assert not np.array_equal(got, wanted)


def test_a_cache_of_another_patch_is_refused(graph: Graph) -> None:
    patch = patch_for(graph.folder)
    bounds = {
        name: graph.bind(p)
        for name, p in {
            "base": None,
            "patch": patch,
            "half": 0.5 * patch,
            "other": patch_for(graph.folder, seed=9),
            "truncated": patch.truncate(2),
        }.items()
    }
    for made, bound in bounds.items():
        cache = graph.new_cache(bound)
        wanted = graph.forward(IDS[:9], cache, bound)
        for name, other in bounds.items():
            if name != made:
                with pytest.raises(StaleCacheError) as error:
                    graph.forward(IDS[9:12], cache, other)
                assert error.value.field == "cache" and error.value.fix
        assert cache.tokens == IDS[:9]
        assert np.array_equal(wanted, graph.forward(IDS[:9], graph.new_cache(bound), bound))
    # The same values under another name are the same patch, also if they are bound a second time.
    renamed = graph.bind(Patch(patch.deltas, replace(patch.config, name="else")))
    cache = graph.new_cache(bounds["patch"])
    graph.forward(IDS[:9], cache, renamed)


def test_a_cache_of_another_graph_is_refused(graph: Graph, gemma: Graph) -> None:
    with pytest.raises(StaleCacheError, match="graph"):
        graph.forward([1], gemma.new_cache(gemma.base), graph.base)


@pytest.mark.parametrize(
    "tokens", [[], [-1], [320], [5, 10**12], [1.5], ["a"], [True], [None], [[1]], list(range(300)) * 2]
)
def test_invalid_tokens_are_refused_and_do_not_change_the_cache(graph: Graph, tokens: list[Any]) -> None:
    cache = graph.new_cache(graph.base)
    first = graph.forward(IDS[:9], cache, graph.base)
    with pytest.raises(RequestError) as error:
        graph.forward(tokens, cache, graph.base)
    assert error.value.field == "tokens"
    assert cache.tokens == IDS[:9]  # the cache is unchanged and still usable
    cache.keep_prefix(IDS[:9])
    assert furthest(graph.forward(IDS[8:9], cache, graph.base), first) < 1e-5


def test_numpy_integers_are_accepted_as_ids(graph: Graph) -> None:
    assert np.array_equal(graph_logits(graph, list(np.array(IDS))), graph_logits(graph, IDS))


def test_the_error_of_a_bad_patch_names_the_field_and_the_fix(graph: Graph) -> None:
    patch = patch_for(graph.folder)
    with pytest.raises(PatchError) as error:
        graph.bind(Patch({(7, "mlp_out"): patch.deltas[0, "mlp_out"]}, patch.config))
    assert error.value.field == "layers.7.mlp_out" and error.value.got == "layer 7"
    assert error.value.wanted == "0..2" and error.value.fix

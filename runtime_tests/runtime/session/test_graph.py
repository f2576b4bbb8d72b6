"""The exported graph in a session: the base, patches, caches, switching. That its logits are right, torch says in
runtime_tests/export/parity, and here by the figures it left with each fixture.

Tiny Llama has one slot a layer, tiny Gemma every slot and sliding layers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
def test_in_pieces_it_says_what_it_says_at_once(either: Graph, rank: int | None, chunks: tuple[int, ...]) -> None:
    bound = either.bind(None if rank is None else patch_for(either.folder, seed=1, rank=rank, scale=0.2))
    assert furthest(graph_logits(either, IDS, bound, chunks), graph_logits(either, IDS, bound)) < TOLERANCE


def test_a_patch_less_itself_is_the_base(either: Graph) -> None:
    patch = patch_for(either.folder, seed=5, rank=3, scale=0.2)
    assert furthest(graph_logits(either, IDS, either.bind(patch - patch)), graph_logits(either, IDS)) < TOLERANCE


def test_only_the_last_logits_unless_all_are_asked_for(graph: Graph) -> None:
    last = graph.forward(IDS, graph.new_cache(graph.base), graph.base)
    assert last.shape == (1, graph.folder.vocab_size) and last.dtype == np.float32
    assert furthest(last, graph_logits(graph, IDS)[-1:]) < 1e-5


# -- bit for bit ---------------------------------------------------------------------------------------------


def test_base_is_untouched_by_patches_that_come_and_go(either: Graph) -> None:
    before = graph_logits(either, IDS)
    for rank in (0, 1, 60):
        bound = either.bind(patch_for(either.folder, seed=rank, rank=rank))
        assert furthest(graph_logits(either, IDS, bound), before) > 0.1
        assert np.array_equal(graph_logits(either, IDS), before)
        del bound
        assert np.array_equal(graph_logits(either, IDS), before)


def test_base_is_untouched_by_a_patch_that_does_not_fit(graph: Graph) -> None:
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
    either.forward(IDS[9:], cache, bound)  # one cache for both


def test_patches_in_threads_at_once_do_not_meet(either: Graph) -> None:
    bounds = [either.base, *(either.bind(patch_for(either.folder, seed=rank, rank=rank)) for rank in (1, 7))]
    steps = (24, *(1,) * 40)
    alone = [graph_logits(either, IDS, bound, steps) for bound in bounds]
    assert furthest(alone[1], alone[2]) > 0.1
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            together = list(pool.map(lambda bound: graph_logits(either, IDS, bound, steps), bounds))
            for one, other in zip(alone, together, strict=True):
                assert np.array_equal(one, other)


# -- caches --------------------------------------------------------------------------------------------------


def test_a_cache_that_grows_says_what_one_run_says(either: Graph) -> None:
    ids = token_ids(330, seed=4)
    bound = either.bind(patch_for(either.folder, seed=4, scale=0.2))
    wanted = graph_logits(either, ids, bound)
    for chunks in ((250, *(1,) * 16, 64), (256, 74), (1, 329)):
        assert furthest(graph_logits(either, ids, bound, chunks), wanted) < TOLERANCE


def test_a_cache_fills_the_window_and_not_more(graph: Graph) -> None:
    ids = token_ids(graph.folder.context_window, seed=5)
    cache = graph.new_cache(graph.base)
    graph.forward(ids[:-1], cache, graph.base)
    graph.forward(ids[-1:], cache, graph.base)
    with pytest.raises(RequestError, match="context window"):
        graph.forward([1], cache, graph.base)
    assert len(cache) == len(ids)


def test_a_cache_that_cannot_grow_is_still_whole(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
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
    graph.forward(ids[200:250], cache, graph.base)  # in the room there still is
    assert furthest(graph.forward(ids[250:], cache, graph.base, all_logits=True), wanted[250:]) < 1e-5


def test_rewinding_is_as_if_the_rest_had_never_been(either: Graph) -> None:
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


def test_logits_handed_out_do_not_change_afterwards(graph: Graph) -> None:
    cache = graph.new_cache(graph.base)
    first = graph.forward(IDS[:4], cache, graph.base, all_logits=True)
    copy = first.copy()
    for token in IDS[4:40]:
        graph.forward([token], cache, graph.base)
    assert np.array_equal(first, copy)


def test_logits_that_need_not_last_are_the_same_and_are_not_copied(graph: Graph) -> None:
    kept, lent = graph.new_cache(graph.base), graph.new_cache(graph.base)
    for tokens in ([1, 2, 3], [4], [5]):
        wanted = graph.forward(tokens, kept, graph.base)
        got = graph.forward(tokens, lent, graph.base, copy=False)
        np.testing.assert_array_equal(got, wanted)
    graph.forward([6], lent, graph.base, copy=False)
    assert not np.array_equal(got, wanted)


def test_a_cache_serves_no_other_patch(graph: Graph) -> None:
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
    # The same values under another name, bound a second time, are the same patch.
    renamed = graph.bind(Patch(patch.deltas, replace(patch.config, name="else")))
    cache = graph.new_cache(bounds["patch"])
    graph.forward(IDS[:9], cache, renamed)


def test_a_cache_serves_no_other_graph(graph: Graph, gemma: Graph) -> None:
    with pytest.raises(StaleCacheError, match="graph"):
        graph.forward([1], gemma.new_cache(gemma.base), graph.base)


@pytest.mark.parametrize(
    "tokens", [[], [-1], [320], [5, 10**12], [1.5], ["a"], [True], [None], [[1]], list(range(300)) * 2]
)
def test_tokens_that_cannot_be_run(graph: Graph, tokens: list[Any]) -> None:
    cache = graph.new_cache(graph.base)
    first = graph.forward(IDS[:9], cache, graph.base)
    with pytest.raises(RequestError) as error:
        graph.forward(tokens, cache, graph.base)
    assert error.value.field == "tokens"
    assert cache.tokens == IDS[:9]  # as it was, and of use
    cache.keep_prefix(IDS[:9])
    assert furthest(graph.forward(IDS[8:9], cache, graph.base), first) < 1e-5


def test_numpy_ids_are_ids(graph: Graph) -> None:
    assert np.array_equal(graph_logits(graph, list(np.array(IDS))), graph_logits(graph, IDS))


def test_errors_of_patches_are_patch_errors_that_say_what_to_do(graph: Graph) -> None:
    patch = patch_for(graph.folder)
    with pytest.raises(PatchError) as error:
        graph.bind(Patch({(7, "mlp_out"): patch.deltas[0, "mlp_out"]}, patch.config))
    assert error.value.field == "layers.7.mlp_out" and error.value.got == "layer 7"
    assert error.value.wanted == "0..2" and error.value.fix

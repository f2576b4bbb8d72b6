"""Captured decode on the CPU: its steps give the logits of a graph without captured decode.

The patches have every rank, mixed or missing parts, or entries. The sequences are short, too long for the buffers, or
rewound.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime_tests.logits import furthest, graph_logits, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import Graph, Lengths, ModelFolder
from tp_runtime.session import cuda_graphs as cuda_graphs

from .conftest import CLOSE, IDS, STEPS, Counted, rank_patches, start_captured, with_captured_decode


@pytest.mark.parametrize("rank", [None, 0, 1, 4, 5, 16, 60, 64, 65])
@pytest.mark.parametrize("chunks", [STEPS, (1,) * 40, (5, 1, 1, 20, 1, 1, 11)], ids=["prefill", "steps", "chunks"])
def test_captured_steps_give_the_logits_of_ordinary_steps(
    plain: Graph, capturing: Graph, rank: int | None, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = None if rank is None else patch_for(plain.folder, seed=1, rank=rank, scale=0.2)
    wanted = graph_logits(plain, IDS, plain.bind(patch), chunks)
    stepped = Counted(monkeypatch, capturing.captured, "step")
    assert furthest(graph_logits(capturing, IDS, capturing.bind(patch), chunks), wanted) < CLOSE
    assert stepped.calls == (0 if rank == 65 else chunks.count(1))  # no bucket has room for rank 65
    if patch is not None:
        assert furthest(wanted, graph_logits(plain, IDS)) > 0.05  # otherwise the patch has no effect


def test_a_patch_with_mixed_ranks_and_missing_parts_gives_the_logits_of_ordinary_steps(
    plain: Graph, capturing: Graph
) -> None:
    wide, narrow = rank_patches(plain, 9, 2)
    one, two = wide.deltas[0, "mlp_out"], narrow.deltas[1, "mlp_out"]
    patch = Patch({(0, "mlp_out"): Delta(one.a, one.b), (1, "mlp_out"): Delta(bias=two.bias)}, wide.config)
    capturing.forward([1], cache := capturing.new_cache(full := capturing.bind(rank_patches(plain, 12)[0])), full)
    assert cache.tokens == [1]  # this fills the bucket of `patch` with another patch
    wanted = graph_logits(plain, IDS, plain.bind(patch), STEPS)
    assert furthest(graph_logits(capturing, IDS, capturing.bind(patch), STEPS), wanted) < CLOSE


def stepped_logits(graph: Graph, patch: Patch | None) -> np.ndarray:
    """Return the last logits of a prompt of 4 ids and of each of the 16 steps after it, [17, vocab]."""
    bound = graph.bind(patch)
    cache = graph.new_cache(bound)
    prompt = graph.forward(IDS[:4], cache, bound)
    return np.concatenate([prompt, *(graph.forward([token], cache, bound) for token in IDS[4:20])])


def test_a_kv_prefix_gives_the_logits_of_ordinary_steps(plain: Graph, capturing: Graph) -> None:
    patch = with_prefix(rank_patches(plain, 3)[0], plain.folder, replaces=[7, 8], entries=5, position=9)
    assert furthest(stepped_logits(capturing, patch), stepped_logits(plain, patch)) < CLOSE


@pytest.mark.parametrize("entries", [Lengths(20, 6), Lengths(4, 13)], ids=["fewer windowed", "more windowed"])
def test_entries_with_a_count_for_each_kind_give_the_logits_of_ordinary_steps(
    tiny_gemma_export: Path, entries: Lengths, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Graph(ModelFolder.open(tiny_gemma_export), "cpu")
    capturing = with_captured_decode(plain.folder)
    stepped = Counted(monkeypatch, capturing.captured, "step")
    ragged = with_prefix(rank_patches(plain, 3)[0], plain.folder, [7, 8], entries, position=25)
    for patch in (ragged, None, ragged):  # the lengths of windowed layers change with the patch, and back
        assert furthest(stepped_logits(capturing, patch), stepped_logits(plain, patch)) < CLOSE
    assert stepped.calls == 3 * 16


def test_sequences_with_other_counts_can_alternate_on_the_captured_buffers(tiny_gemma_export: Path) -> None:
    """The sequence that gives up the buffers keeps what each kind of layer holds."""
    plain = Graph(ModelFolder.open(tiny_gemma_export), "cpu")
    capturing = with_captured_decode(plain.folder)
    narrow = rank_patches(plain, 3)[0]
    patches = [with_prefix(narrow, plain.folder, [7, 8], Lengths(20, count), position=25) for count in (6, 9)]
    bounds = [capturing.bind(patch) for patch in patches]
    caches = [capturing.new_cache(bound) for bound in bounds]
    for start, end in ((0, 6), (6, 7), (7, 12), (12, 13), (13, 14)):
        for patch, bound, cache in zip(patches, bounds, caches, strict=True):
            got = capturing.forward(IDS[start:end], cache, bound)
            assert furthest(got, plain.run([7, 8, *IDS[:end]], plain.bind(patch))[-1:]) < CLOSE


def test_a_sequence_whose_windowed_layers_exceed_the_capacity_takes_ordinary_steps(
    tiny_gemma_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPACITY", 24)
    graph = with_captured_decode(ModelFolder.open(tiny_gemma_export))
    stepped = Counted(monkeypatch, graph.captured, "step")
    patch = with_prefix(rank_patches(graph, 3)[0], graph.folder, [7, 8], Lengths(4, 13), position=25)
    graph_logits(graph, IDS[:9], graph.bind(None), (4, *(1,) * 5))
    bound = graph.bind(patch)
    cache = graph.new_cache(bound)
    for token in IDS[:20]:
        graph.forward([token], cache, bound)
    assert stepped.calls == 5 + 24 - 13


def test_a_patch_set_as_default_gives_the_logits_of_ordinary_steps(plain: Graph) -> None:
    patch = rank_patches(plain, 5)[0]
    graph = Graph(plain.folder, "cpu", defaults=patch)
    start_captured(graph)
    for bound, same in ((graph.default, plain.bind(patch)), (graph.base, plain.base)):
        wanted = graph_logits(plain, IDS, same, STEPS)
        assert furthest(graph_logits(graph, IDS, bound, STEPS), wanted) < CLOSE


def test_a_sequence_longer_than_the_capacity_takes_ordinary_steps(
    plain: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPACITY", 24)
    graph = with_captured_decode(plain.folder)
    stepped = Counted(monkeypatch, graph.captured, "step")
    wanted = graph_logits(plain, IDS, chunks=STEPS)
    assert furthest(graph_logits(graph, IDS, chunks=STEPS), wanted) < CLOSE
    assert stepped.calls == 24 - 9
    cache = graph.new_cache(graph.base)  # this sequence is too long from the start
    assert furthest(graph.forward(IDS, cache, graph.base, all_logits=True), wanted) < CLOSE
    assert graph.captured is not None and not graph.captured.holds(cache)


def test_a_rewound_sequence_can_continue(plain: Graph, capturing: Graph) -> None:
    bound = capturing.bind(rank_patches(plain, 4)[0])
    cache = capturing.new_cache(bound)
    capturing.forward(IDS[:20], cache, bound)
    for token in IDS[20:30]:
        capturing.forward([token], cache, bound)
    ids = [*IDS[:15], *token_ids(12, seed=2)]
    common = cache.keep_prefix(ids)
    got = [capturing.forward(ids[common:-3], cache, bound), *(capturing.forward([t], cache, bound) for t in ids[-3:])]
    wanted = graph_logits(plain, ids, plain.bind(rank_patches(plain, 4)[0]))
    assert furthest(np.concatenate(got), wanted[-4:]) < CLOSE


def test_returned_logits_are_not_overwritten_by_the_next_step(capturing: Graph) -> None:
    cache = capturing.new_cache(capturing.base)
    first = capturing.forward(IDS[:1], cache, capturing.base)
    copy = first.copy()
    capturing.forward(IDS[1:2], cache, capturing.base)
    assert np.array_equal(first, copy)

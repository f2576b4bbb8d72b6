"""Captured decode of several sequences: they take turns in the same buffers, end, and fail without a change."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime_tests.logits import furthest, graph_logits
from tp_runtime.session import Graph

from .conftest import CLOSE, IDS, STEPS, Counted, rank_patches


def test_sequences_can_alternate_their_decode_steps(
    plain: Graph, capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = [None, *rank_patches(plain, 4, 4, 20)]
    wanted = [graph_logits(plain, IDS, plain.bind(patch)) for patch in patches]
    bounds = [capturing.bind(patch) for patch in patches]
    caches = [capturing.new_cache(bound) for bound in bounds]
    for bound, cache in zip(bounds, caches, strict=True):
        capturing.forward(IDS[:9], cache, bound)
    refills = Counted(monkeypatch, capturing.kv, "refill")
    for at in range(9, 30):
        for bound, cache, logits in zip(bounds, caches, wanted, strict=True):
            assert furthest(capturing.forward(IDS[at : at + 1], cache, bound), logits[at : at + 1]) < CLOSE
    assert capturing.captured is not None and [capturing.captured.holds(cache) for cache in caches] == [
        False,
        False,
        False,
        True,
    ]
    assert refills.calls == 0  # decode steps do not copy a sequence into the buffers
    capturing.forward(IDS[30:36], caches[1], bounds[1])  # a longer run copies this sequence back into the buffers
    assert capturing.captured.holds(caches[1]) and refills.calls == len(capturing.kv.names)
    for at in range(36, 40):
        for i in (1, 3):
            logits = capturing.forward(IDS[at : at + 1] if i == 1 else [IDS[at - 6]], caches[i], bounds[i])
            assert furthest(logits, wanted[i][at : at + 1] if i == 1 else wanted[i][at - 6 : at - 5]) < CLOSE


def test_sequences_can_decode_in_concurrent_threads(plain: Graph, capturing: Graph) -> None:
    patches = [None, *rank_patches(plain, 3, 7, 30)]
    wanted = [graph_logits(plain, IDS, plain.bind(patch), STEPS) for patch in patches]
    bounds = [capturing.bind(patch) for patch in patches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda bound: graph_logits(capturing, IDS, bound, STEPS), bounds))
            assert all(furthest(one, other) < CLOSE for one, other in zip(got, wanted, strict=True))


def test_a_dropped_sequence_is_not_copied_out_of_the_buffers(capturing: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing.forward(IDS[:9], cache := capturing.new_cache(capturing.base), capturing.base)
    del cache
    gc.collect()
    read = Counted(monkeypatch, capturing.kv, "content")
    capturing.forward(IDS[:9], capturing.new_cache(capturing.base), capturing.base)
    assert read.calls == len(capturing.kv.names)  # these calls read the new sequence, which is empty


def test_a_run_that_fails_does_not_change_the_sequence(
    plain: Graph, capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = graph_logits(plain, IDS)
    cache = capturing.new_cache(capturing.base)
    capturing.forward(IDS[:9], cache, capturing.base)
    assert capturing.captured is not None
    with monkeypatch.context() as broken:
        broken.setattr(capturing.captured, "session", None)
        with pytest.raises(AttributeError):
            capturing.forward(IDS[9:10], cache, capturing.base)
    assert cache.tokens == IDS[:9]
    assert furthest(capturing.forward(IDS[9:10], cache, capturing.base), wanted[9:10]) < CLOSE

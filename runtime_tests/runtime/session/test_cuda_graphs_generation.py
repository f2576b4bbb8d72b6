"""Captured decode below generation: prefix cache, batches, drafts, and completions that are dropped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime_tests.drafts import Scripted, after
from runtime_tests.logits import furthest, graph_logits
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import Batch, PrefixCache, Sampler, engine
from tp_runtime.session import BoundPatch, Graph

from .conftest import CLOSE, IDS, Counted, before_each_run, rank_patches


def completion(graph: Graph, bound: BoundPatch, **options: Any) -> list[int]:
    return list(
        engine.generate(graph, IDS[:9], bound, sampler=Sampler(), max_new_tokens=12, eos_ids=frozenset(), **options)
    )


def test_captured_decode_works_together_with_the_prefix_cache_and_batches(plain: Graph, capturing: Graph) -> None:
    patches = [None, *rank_patches(plain, 4, 20)]
    wanted = [completion(plain, plain.bind(patch)) for patch in patches]
    store = PrefixCache(2**24)
    for _ in range(2):
        assert [completion(capturing, capturing.bind(patch), prefix_cache=store) for patch in patches] == wanted
    assert store.hits == 3
    batch = Batch(capturing, 4)
    kept = capturing.new_cache(capturing.base)
    capturing.forward(IDS[:9], kept, capturing.base)  # it owns the buffers while the batch is filled and run
    rows = [
        batch.join(IDS[:9], capturing.bind(patch), sampler=Sampler(), max_new_tokens=12, eos_ids=frozenset())
        for patch in patches
    ]
    while batch.step():
        pass
    assert [row.tokens[9:] for row in rows] == wanted
    assert capturing.captured is not None and capturing.captured.holds(kept), "no row took the buffers"
    assert furthest(capturing.forward(IDS[9:10], kept, capturing.base), graph_logits(plain, IDS[:10])[9:]) < CLOSE


def test_drafts_take_turns_with_captured_steps_in_the_same_buffers(
    plain: Graph, capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that verifies a draft is an ordinary run in the captured buffers, and copies nothing."""
    size = plain.folder.vocab_size
    stepped = Counted(monkeypatch, capturing.captured, "step")
    refilled = Counted(monkeypatch, capturing.kv, "refill")
    for patch in (None, with_prefix(rank_patches(plain, 3)[0], plain.folder, IDS[:2], 5, position=9)):
        wanted = completion(plain, plain.bind(patch))
        for script in ([(2, 0), (0, 0), (1, 2), (0, 0), (0, 0)], [(0, 3), (0, 0)]):
            drafter = Scripted(after([*IDS[:9], *wanted], size), script, size)
            monkeypatch.setattr(engine, "Drafter", drafter)
            stepped.calls = refilled.calls = 0
            assert completion(capturing, capturing.bind(patch), lookup=8) == wanted
            assert stepped.calls > 1
            assert refilled.calls == (0 if patch is None else len(plain.kv.names))  # the entries, once


def test_a_draft_of_a_sequence_that_lost_the_captured_buffers_does_not_take_them_back(
    plain: Graph, capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = completion(plain, plain.base)
    size = plain.folder.vocab_size
    monkeypatch.setattr(engine, "Drafter", Scripted(after([*IDS[:9], *wanted], size), [(2, 1), (0, 0)], size))
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_ids": frozenset(), "lookup": 8}
    one = engine.generate(capturing, IDS[:9], capturing.base, sampler=Sampler(), **options)
    two = engine.generate(capturing, IDS[:9], capturing.base, sampler=Sampler(), **options)
    refilled = Counted(monkeypatch, capturing.kv, "refill")
    assert list(zip(one, two, strict=True)) == list(zip(wanted, wanted, strict=True))
    assert refilled.calls == 0


def test_a_completion_can_be_dropped_on_the_captured_decode_thread(
    capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector closes a completion on the very thread that another sequence waits for."""
    store, options = PrefixCache(2**24), {"sampler": Sampler(), "eos_ids": frozenset()}
    dropped: list[Any] = [
        engine.generate(capturing, IDS[:9], capturing.base, max_new_tokens=12, prefix_cache=store, **options)
    ]
    next(dropped[0])
    next(dropped[0])

    before_each_run(capturing, monkeypatch, lambda _options: dropped.clear())
    before = store.bytes
    with ThreadPoolExecutor(1) as pool:
        pool.submit(capturing.forward, IDS[:1], capturing.new_cache(capturing.base), capturing.base).result()
    assert store.bytes > before and not dropped

"""Captured decode keeps its buffers, its bindings, its graph ids and its threads, because a captured graph needs them.

A step and a switch of patches write into the same memory, and a switch back writes nothing.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime_tests.logits import graph_logits
from tp_runtime.generation import Batch, Sampler
from tp_runtime.session import Graph

from .conftest import IDS, Counted, before_each_run, rank_patches


def test_nothing_is_bound_or_allocated_between_steps(capturing: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capturing.captured
    assert captured is not None
    bound, other = (capturing.bind(patch) for patch in rank_patches(capturing, 3, 4))
    caches = {bound.key: capturing.new_cache(bound)}
    capturing.forward(IDS[:5], caches[bound.key], bound)
    packed = [captured.io._inputs, captured.io.best, *(bucket.slots for bucket in captured.buckets)]
    values = [captured.io._logits, *captured.buffers.values(), *(one._buffer for one in packed if one is not None)]
    before = [(value.data_ptr(), value.shape()) for value in values]
    allocations = Counted(monkeypatch, capturing.ort.OrtValue, "ortvalue_from_numpy")
    bindings = Counted(monkeypatch, capturing.session, "io_binding")
    rebound = [
        Counted(monkeypatch, bucket.binding, f"bind_{kind}_input")
        for bucket in captured.buckets
        for kind in ("ortvalue", "cpu")
    ]
    for token in IDS[5:12]:
        capturing.forward([token], caches[bound.key], bound)
    captured.switch(other.key, other.deltas)  # a switch also writes in place
    assert (allocations.calls, bindings.calls) == (0, 0)
    assert [count.calls for count in rebound] == [0] * 2 * len(captured.buckets)
    assert [(value.data_ptr(), value.shape()) for value in values] == before


def test_every_bucket_has_its_own_graph_id_and_ordinary_runs_have_none(
    capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    before_each_run(capturing, monkeypatch, lambda options: seen.append(options.get_run_config_entry("gpu_graph_id")))
    for patch in (None, *rank_patches(capturing, 4, 16, 64)):
        bound = capturing.bind(patch)
        cache = capturing.new_cache(bound)
        capturing.forward(IDS[:3], cache, bound)
        capturing.forward(IDS[3:4], cache, bound)
    assert seen == ["-1", "1", "-1", "2", "-1", "3", "-1", "4"]


def test_runs_are_on_the_thread_that_opened_the_model_or_on_one_for_all_others(
    capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    before_each_run(capturing, monkeypatch, lambda _options: threads.add(threading.get_ident()))
    monkeypatch.setattr(capturing, "session", None)  # nothing else may run the session
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: graph_logits(capturing, IDS[:12], chunks=(4, *(1,) * 8)), range(6)))
    assert len(threads) == 1 and threading.get_ident() not in threads
    threads.clear()
    graph_logits(capturing, IDS[:12], chunks=(4, *(1,) * 8))
    assert threads == {threading.get_ident()}


def batch_steps(graph: Graph) -> None:
    """Run steps of a batch, which need no exclusive use of the captured buffers."""
    batch = Batch(graph, 2)
    for _row in range(2):
        batch.join(IDS[:4], graph.base, sampler=Sampler(), max_new_tokens=8, eos_ids=frozenset())
    for _step in range(4):
        batch.step()


def test_runs_take_turns_and_one_on_the_opening_thread_holds_the_lock_too(
    capturing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dropped completion may take the lock inside a run, so no other thread may hold it and wait for its turn."""
    captured = capturing.captured
    assert captured is not None
    opener, seen = threading.get_ident(), set[tuple[bool, bool, bool]]()

    def free(lock: Any) -> bool:
        """Return whether a thread that holds nothing could take a lock now."""
        if acquired := lock.acquire(blocking=False):
            lock.release()
        return bool(acquired)

    def look(_options: Any) -> None:
        here = threading.get_ident() == opener
        turn, lock = (probe.submit(free, one).result() for one in (captured._turn, captured._lock))
        seen.add((here, turn, here and lock))

    before_each_run(capturing, monkeypatch, look)
    with ThreadPoolExecutor(1) as probe, ThreadPoolExecutor(1) as other:
        batch_steps(capturing)
        other.submit(batch_steps, capturing).result()
    assert seen == {(True, False, False), (False, False, False)}


def test_a_switch_back_writes_nothing(capturing: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of different buckets do not displace each other; a bucket keeps the last patch that was written to it."""
    captured = capturing.captured
    assert captured is not None
    small, large = (capturing.bind(patch) for patch in rank_patches(capturing, 2, 30))
    for bound in (small, large):
        captured.switch(bound.key, bound.deltas)
    written = Counted(monkeypatch, captured, "_write")
    for bound in (small, large, small, large):
        assert captured.switch(bound.key, bound.deltas)
    assert written.calls == 0
    other = capturing.bind(rank_patches(capturing, 3)[0])
    captured.switch(other.key, other.deltas)
    captured.switch(small.key, small.deltas)
    assert written.calls == 2

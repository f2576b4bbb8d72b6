"""Captured decode on the CPU: the same buffers, switches and changes of sequence as on CUDA, but nothing is captured.

The tests compare logits with those of a graph without captured decode. The tests in runtime_tests/gpu need a GPU.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.drafts import Scripted, after
from runtime_tests.logits import furthest, graph_logits, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import DeviceUnavailableError, RequestError
from tp_runtime.generation import Batch, PrefixCache, Sampler, engine
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import BoundPatch, Graph, Lengths, ModelFolder
from tp_runtime.session import cuda_graphs as cuda_graphs
from tp_runtime.session import graph as graph_module
from tp_runtime.session.device import CUDA, Device

CLOSE = 1e-5
IDS = token_ids(40)
STEPS = (9, *(1,) * 31)  # a prefill, then decode steps


@pytest.fixture(scope="module", params=["llama", "gemma"])
def plain(request: pytest.FixtureRequest) -> Graph:
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


@pytest.fixture(scope="module")
def capturing(plain: Graph) -> Graph:
    return with_captured_decode(plain.folder)


def with_captured_decode(folder: ModelFolder) -> Graph:
    """Open a graph on the CPU whose decode steps use the captured decode buffers."""
    graph = Graph(folder, "cpu")
    graph._start_captured()
    graph._steps_in_place = False  # as on CUDA
    return graph


def rank_patches(graph: Graph, *ranks: int) -> list[Patch]:
    return [patch_for(graph.folder, seed=rank, rank=rank, scale=0.2) for rank in ranks]


class Counted:
    """A replacement for a method that counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls, self._real = 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._real(*args, **kwargs)


# -- steps ---------------------------------------------------------------------------------------------------


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
    graph._start_captured()
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


# -- fixed buffers and bindings ------------------------------------------------------------------------------


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
    captured = capturing.captured
    assert captured is not None
    seen: list[str] = []

    class Session:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            seen.append(options.get_run_config_entry("gpu_graph_id"))
            capturing.session.run_with_iobinding(binding, options)

    monkeypatch.setattr(captured, "session", Session())
    for patch in (None, *rank_patches(capturing, 4, 16, 64)):
        bound = capturing.bind(patch)
        cache = capturing.new_cache(bound)
        capturing.forward(IDS[:3], cache, bound)
        capturing.forward(IDS[3:4], cache, bound)
    assert seen == ["-1", "1", "-1", "2", "-1", "3", "-1", "4"]


def test_every_run_is_on_one_thread(capturing: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    session = capturing.session

    class Session:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            threads.add(threading.get_ident())
            session.run_with_iobinding(binding, options)

    assert capturing.captured is not None
    monkeypatch.setattr(capturing.captured, "session", Session())
    monkeypatch.setattr(capturing, "session", None)  # nothing else may run the session
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: graph_logits(capturing, IDS[:12], chunks=(4, *(1,) * 8)), range(6)))
    assert len(threads) == 1


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


# -- several sequences ---------------------------------------------------------------------------------------


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


# -- together with other features ----------------------------------------------------------------------------


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
    store, session, options = PrefixCache(2**24), capturing.session, {"sampler": Sampler(), "eos_ids": frozenset()}
    dropped: list[Any] = [
        engine.generate(capturing, IDS[:9], capturing.base, max_new_tokens=12, prefix_cache=store, **options)
    ]
    next(dropped[0])
    next(dropped[0])

    class Session:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            dropped.clear()
            session.run_with_iobinding(binding, options)

    assert capturing.captured is not None
    monkeypatch.setattr(capturing.captured, "session", Session())
    before = store.bytes
    capturing.forward(IDS[:1], capturing.new_cache(capturing.base), capturing.base)
    assert store.bytes > before and not dropped


# -- requesting captured decode ------------------------------------------------------------------------------


def test_captured_graphs_on_the_cpu_are_refused(plain: Graph) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"cuda_graphs.*Fix: leave cuda_graphs out"):
        Graph(plain.folder, "cpu", cuda_graphs=True)
    # The request needs CUDA, so it does not fall back.
    with pytest.raises(DeviceUnavailableError, match="has no CUDA provider"):
        Graph(plain.folder, "auto", cuda_graphs=True)
    with pytest.raises(DeviceUnavailableError, match="the device is unknown"):
        Graph(plain.folder, "tpu", cuda_graphs=True)


def test_captured_graphs_of_a_graph_that_concatenates_are_refused(plain: Graph) -> None:
    with pytest.raises(RequestError, match="optimum route"):
        Graph(replace(plain.folder, route="optimum"), "auto", cuda_graphs=True)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[bool]]:
    """A function that makes CUDA available, with a CPU session underneath.

    Its argument is the exception that refuses a session with captured steps, or None. It returns the list of the
    `cuda_graphs` flags that sessions were requested with.
    """

    def install(refusal: Exception | None) -> list[bool]:
        requested: list[bool] = []
        real = graph_module.create_session

        def create(path: Path, device: Device, options: Any, cuda_graphs: bool, _cuda_options: Any) -> Any:
            requested.append(cuda_graphs)
            if cuda_graphs and refusal is not None:
                raise DeviceUnavailableError("CUDA was asked for but is not available", field="device") from refusal
            session, _ = real(path, Device("cpu", "CPUExecutionProvider"), options)
            return session, Device("cpu", "CPUExecutionProvider")

        monkeypatch.setattr(graph_module, "select_device", lambda name: Device(name, CUDA))
        monkeypatch.setattr(graph_module, "create_session", create)
        return requested

    return install


def test_captured_graphs_are_used_on_cuda(plain: Graph, on_cuda: Callable[[Exception | None], list[bool]]) -> None:
    requested = on_cuda(None)
    graph = Graph(plain.folder, "auto", cuda_graphs=True)
    assert requested == [True] and graph.captured is not None and graph.capture_failure is None
    assert furthest(graph_logits(graph, IDS, chunks=STEPS), graph_logits(plain, IDS, chunks=STEPS)) < CLOSE


def test_a_refused_session_is_reported_once_and_replaced_by_an_ordinary_one(
    plain: Graph, on_cuda: Callable[[Exception | None], list[bool]], caplog: pytest.LogCaptureFixture
) -> None:
    requested = on_cuda(RuntimeError("all compute graph nodes have not been\n partitioned to the CUDA provider"))
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        graph = Graph(plain.folder, "cuda", cuda_graphs=True)
        assert furthest(graph_logits(graph, IDS, chunks=STEPS), graph_logits(plain, IDS, chunks=STEPS)) < CLOSE
    assert requested == [True, False] and graph.captured is None
    assert graph.capture_failure == "all compute graph nodes have not been partitioned to the CUDA provider"
    assert [record.message for record in caplog.records] == [f"decode steps are not captured: {graph.capture_failure}"]


def test_a_failed_capture_is_reported_and_replaced_by_an_ordinary_session(
    plain: Graph, on_cuda: Callable[[Exception | None], list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = on_cuda(None)

    def fail(self: cuda_graphs.CapturedDecode) -> None:
        raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs.CapturedDecode, "capture", fail)
    graph = Graph(plain.folder, "cuda", cuda_graphs=True)
    assert requested == [True, False] and graph.captured is None and "CUDA failure 900" in str(graph.capture_failure)
    assert furthest(graph_logits(graph, IDS, chunks=STEPS), graph_logits(plain, IDS, chunks=STEPS)) < CLOSE


def test_attention_that_runs_on_the_cpu_is_reported(
    plain: Graph,
    on_cuda: Callable[[Exception | None], list[bool]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_cuda(None)
    monkeypatch.setattr(graph_module, "input_kinds", lambda *_: {"past_key_values.0.key": "cpu"})
    create = graph_module.create_session
    monkeypatch.setattr(graph_module, "create_session", lambda *args: (create(*args)[0], Device("cuda", CUDA)))
    # The folder has no slots, because no CUDA device can hold their tensors. So the graph has some that it does not.
    monkeypatch.setattr(graph_module, "check_interface", lambda *_: None)
    folder = replace(plain.folder, slots={})
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        graph = Graph(folder, "cuda")
    assert graph.kv.device == "cpu" and "attention runs on the CPU" in caplog.text

"""Windowed layers are shown the end of their buffers, and with `window_cache` they drop what no later id attends to.

Tiny Gemma has a full layer between two windowed ones; their window is 8. The constants are made small, so that short
texts move what is shown, drop positions, and run in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.cli import Cli
from runtime_tests.committed import private_copy
from runtime_tests.drafts import Scripted, after
from runtime_tests.failures import Failure
from runtime_tests.logits import furthest, graph_logits, plain_session_logits, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import Batch, PrefixCache, Sampler, engine, prompt_entries
from tp_runtime.model import PatchedModel
from tp_runtime.patch import KV_PARTS, Patch
from tp_runtime.session import (
    WINDOWED_SHIFT,
    BoundPatch,
    Graph,
    KVCache,
    Lengths,
    ModelFolder,
    kv_buffers,
    past_name,
    prepare,
    windows,
)
from tp_runtime.session.prepared import prepared_graph

CLOSE = 1e-5
WINDOW, LIMIT = 8, 16
LEAD = [5, 6, 7]
IDS = [*LEAD, *token_ids(90, seed=1)]
COUNTS = {"base": None, "fewer windowed": Lengths(20, 6), "more windowed": Lengths(4, 13), "far more": Lengths(9, 40)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kv_buffers, "SLIDE", 3)
    monkeypatch.setattr(windows, "LONGEST_RUN", 12)
    yield


@pytest.fixture(scope="module")
def whole(tiny_gemma_export: Path) -> Graph:
    """A graph that shows the operator everything, in one run."""
    graph = Graph(ModelFolder.open(tiny_gemma_export), "cpu")
    graph.kv._shows_parts = False
    plan = graph.kv.plan
    assert plan is not None and not plan.bounded and plan.window == WINDOW
    graph.kv.plan = _Whole(WINDOW, False)
    return graph


class _Whole(windows.WindowPlan):
    @property
    def longest_run(self) -> int:
        return 1000


@pytest.fixture(scope="module", params=[False, True], ids=["whole caches", "window caches"])
def graph(request: pytest.FixtureRequest, tiny_gemma_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_gemma_export), "cpu", window_cache=request.param)


@pytest.fixture(scope="module")
def bounded(tiny_gemma_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_gemma_export), "cpu", window_cache=True)


def patch_of(graph: Graph, counts: Lengths | None) -> Patch | None:
    weights = patch_for(graph.folder, seed=3, rank=3, scale=0.2)
    return None if counts is None else with_prefix(weights, graph.folder, LEAD, counts, position=45)


def bound_in(graph: Graph, counts: Lengths | None) -> BoundPatch:
    return graph.bind(patch_of(graph, counts))


def positions_of(cache: KVCache) -> set[int]:
    """Return the numbers of positions that the buffers of windowed layers have room for."""
    return {cache.buffers[past].shape()[2] for past in cache.windowed}


class Runs:
    """Records the numbers of ids that a graph's runs take."""

    def __init__(self, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        run = graph._run

        def recorded(tokens: Sequence[int], *args: Any) -> Any:
            self.sizes.append(len(tokens))
            return run(tokens, *args)

        monkeypatch.setattr(graph, "_run", recorded)


# -- what is computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_logits_are_those_of_whole_caches(graph: Graph, whole: Graph, counts: Lengths | None) -> None:
    bound = bound_in(graph, counts)
    lead = len(LEAD) if counts else 0
    wanted = whole.run(IDS, bound_in(whole, counts))
    assert furthest(graph.run(IDS, bound), wanted) < CLOSE
    for size in (1, 2, 7, 11, 30):
        chunks = [size] * ((len(IDS) - lead) // size)
        cache, found = graph.new_cache(bound), []
        for begin in range(lead, lead + sum(chunks), size):
            found.append(graph.forward(IDS[begin : begin + size], cache, bound, all_logits=True))
        assert furthest(np.concatenate(found), wanted[: sum(chunks)]) < CLOSE


def test_a_plain_session_without_the_runtime_gives_the_same_logits(graph: Graph) -> None:
    assert furthest(graph_logits(graph, IDS), plain_session_logits(graph.folder.path, IDS)[0]) < CLOSE


def test_a_long_prompt_runs_in_parts_and_gives_the_logits_that_were_asked_for(
    graph: Graph, whole: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(graph, monkeypatch)
    wanted = whole.run(IDS, whole.base)
    longest = graph.kv.plan.longest_run if graph.kv.plan else 0
    for last in (1, 5, 12, 13, 40, len(IDS)):
        found = graph.forward(IDS, graph.new_cache(graph.base), graph.base, last=last)
        assert furthest(found, wanted[-last:]) < CLOSE
    assert longest == (9 if graph.kv.plan and graph.kv.plan.bounded else 12) and max(runs.sizes) == longest


def test_a_prepared_graph_does_the_same(tmp_path: Path, whole: Graph) -> None:
    folder = ModelFolder.open(private_copy("tiny-gemma", tmp_path))
    assert prepare(folder) and prepared_graph(folder) is not None
    packed = Graph(folder, "cpu", window_cache=True)
    assert furthest(packed.run(IDS, packed.base), whole.run(IDS, whole.base)) < CLOSE


def test_the_operator_is_shown_little_more_than_the_window(graph: Graph) -> None:
    cache = graph.new_cache(graph.base)
    for token in IDS:
        graph.forward([token], cache, graph.base)
        shown = len(cache) + int(cache.bound_lengths[WINDOWED_SHIFT].numpy()[0])
        assert min(len(cache), WINDOW) <= shown <= WINDOW + 3
    del cache.tokens[40:]
    graph.forward([4], cache, graph.base)
    assert len(cache) + int(cache.bound_lengths[WINDOWED_SHIFT].numpy()[0]) == WINDOW


# -- how much is held ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_window_caches_hold_two_windows_at_most(bounded: Graph, counts: Lengths | None) -> None:
    bound = bound_in(bounded, counts)
    cache = bounded.new_cache(bound)
    for token in IDS[len(cache) :]:
        bounded.forward([token], cache, bound)
        assert max(positions_of(cache)) <= LIMIT and cache.lengths.windowed <= LIMIT and cache.reaches
    assert cache.lengths.windowed + cache.dropped == cache.filled + cache.entries.windowed - cache.entries.full
    held = {name: array.shape[1] for name, array in bounded.content(cache).items()}
    assert held[past_name(1, "key")] == cache.filled and held[past_name(0, "key")] == cache.lengths.windowed


def test_whole_caches_drop_nothing(tiny_gemma_export: Path) -> None:
    graph = Graph(ModelFolder.open(tiny_gemma_export), "cpu")
    cache = graph.new_cache(graph.base)
    graph.forward(IDS, cache, graph.base)
    assert cache.dropped == 0 and cache.lengths == (len(IDS), len(IDS))


def test_models_without_windowed_layers_do_not_change(tiny_llama_export: Path) -> None:
    folder = ModelFolder.open(tiny_llama_export)
    graph, plain = Graph(folder, "cpu", window_cache=True), Graph(folder, "cpu")
    assert graph.kv.plan is None and np.array_equal(graph.run(IDS, graph.base), plain.run(IDS, plain.base))


# -- going back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("back", [1, 3, 8, 30, 80])
def test_a_cache_that_goes_back_continues_with_the_logits_of_one_run(
    graph: Graph, whole: Graph, counts: Lengths | None, back: int
) -> None:
    bound, other = bound_in(graph, counts), token_ids(20, seed=9)
    wanted = whole.run([*IDS[:-back], *other], bound_in(whole, counts))[-len(other) :]
    for step in (1, 20):
        cache = graph.new_cache(bound)
        graph.forward(IDS[len(cache) :], cache, bound)
        del cache.tokens[len(IDS) - back :]
        found = [graph.forward(other[i : i + step], cache, bound, all_logits=True) for i in range(0, len(other), step)]
        assert furthest(np.concatenate(found), wanted) < CLOSE


def test_only_a_cache_that_lacks_something_is_computed_again(bounded: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, runs = bounded.new_cache(bounded.base), Runs(bounded, monkeypatch)
    bounded.forward(IDS, cache, bounded.base)
    del runs.sizes[:], cache.tokens[-1:]
    assert cache.reaches
    bounded.forward([4], cache, bounded.base)
    assert runs.sizes == [1]
    del cache.tokens[-30:]
    assert not cache.reaches
    bounded.forward([4], cache, bounded.base)
    assert sum(runs.sizes) == 1 + len(IDS) - 30 + 1 and cache.reaches


@pytest.mark.parametrize("back", [0, 30])
@pytest.mark.parametrize("new", [1, 30])
def test_a_run_that_failed_can_be_tried_again(
    bounded: Graph, whole: Graph, monkeypatch: pytest.MonkeyPatch, back: int, new: int
) -> None:
    """Also where positions were dropped for it, where a part of it had run, and where the cache is computed again."""
    other = token_ids(new, seed=9)
    wanted = whole.run([*IDS[: len(IDS) - back], *other], whole.base)[-new:]
    execute = bounded.kv.prepare
    for failing in range(9):
        cache = bounded.new_cache(bounded.base)
        bounded.forward(IDS, cache, bounded.base)
        del cache.tokens[len(IDS) - back :]
        calls = iter(range(1000))

        def prepared(*args: Any, calls: Iterator[int] = calls, failing: int = failing) -> None:
            execute(*args)
            if next(calls) == failing:
                raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(bounded.kv, "prepare", prepared)
            try:
                found = bounded.forward(other, cache, bounded.base, all_logits=True)
            except MemoryError:
                assert cache.tokens == IDS[: len(IDS) - back]
                found = bounded.forward(other, cache, bounded.base, all_logits=True)
        assert furthest(found, wanted) < CLOSE


@pytest.mark.parametrize("back", [0, 30])
def test_an_interrupt_at_any_line_leaves_a_cache_that_continues(bounded: Graph, whole: Graph, back: int) -> None:
    ids = IDS[:50]
    wanted = whole.run([*ids[: 50 - back], 4, 9], whole.base)[-1]
    counted = Failure("lines")
    at, points = -1, 1
    while at < points:
        cache = bounded.new_cache(bounded.base)
        bounded.forward(ids, cache, bounded.base)
        while cache.capacity > len(cache) and not back:  # the next run drops positions
            bounded.forward([3], cache, bounded.base)
            del ids[50:]
            break
        del cache.tokens[50 - back :]
        failure = Failure("lines", at) if at >= 0 else counted
        try:
            failure.run(lambda cache=cache: bounded.forward([4], cache, bounded.base))
        except KeyboardInterrupt:
            if len(cache) == 50 - back:
                bounded.forward([4], cache, bounded.base)
        points = max(points, counted.passed)
        assert cache.tokens == [*ids[: 50 - back], 4]
        assert furthest(bounded.forward([9], cache, bounded.base)[0], wanted) < CLOSE
        at += 7  # every seventh line: a run has hundreds


# -- what builds on caches -------------------------------------------------------------------------------------


def ids_of(graph: Graph, bound: BoundPatch, prompt: list[int], **options: Any) -> list[int]:
    sampler = Sampler()
    made = engine.generate(graph, prompt, bound, sampler=sampler, max_new_tokens=30, eos_ids=frozenset(), **options)
    return list(made)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rejected_drafts_leave_nothing_behind(
    graph: Graph, whole: Graph, counts: Lengths | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = bound_in(graph, counts)
    wanted = ids_of(whole, bound_in(whole, counts), IDS[:40])
    for script in ([(0, 4)], [(2, 1), (0, 1), (6, 0), (0, 3)], [(1, 14)]):
        with monkeypatch.context() as patched:
            drafter = Scripted(after([*IDS[:40], *wanted], graph.folder.vocab_size), script, graph.folder.vocab_size)
            patched.setattr(engine, "Drafter", drafter)
            assert ids_of(graph, bound, IDS[:40], lookup=16) == wanted


def test_a_dialogue_that_is_edited_is_answered_like_a_new_one(graph: Graph, whole: Graph) -> None:
    cache = graph.new_cache(graph.base)
    for prompt in (IDS[:40], [*IDS[:60], 4, 5], IDS[:20], [*IDS[:20], 9, 9], IDS):
        assert ids_of(graph, graph.base, prompt, cache=cache) == ids_of(whole, whole.base, prompt)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_prefix_cache_gives_what_it_can_and_changes_nothing(
    graph: Graph, whole: Graph, counts: Lengths | None, tmp_path: Path
) -> None:
    bound, store = bound_in(graph, counts), PrefixCache(1 << 24)
    engine.prefill(graph, IDS[:40], bound, store)
    begins = (IDS[:40], IDS[:40], IDS[:39], IDS[:25], IDS[:70])
    questions = [[*begin, *token_ids(9, seed=seed)] for seed, begin in enumerate(begins)]
    wanted = [ids_of(whole, bound_in(whole, counts), prompt) for prompt in questions]
    assert [ids_of(graph, bound, prompt, prefix_cache=store) for prompt in questions] == wanted
    assert store.hits >= 2  # the stored beginning serves every prompt that begins with all of it
    file = tmp_path / "cache.safetensors"
    store.save(file, graph.folder)
    for reader in (graph, whole):
        loaded = PrefixCache(1 << 24)
        assert loaded.load(file, reader.folder) == store.entries
        again = bound_in(reader, counts)
        assert [ids_of(reader, again, prompt, prefix_cache=loaded) for prompt in questions] == wanted
        assert loaded.hits >= 2


def test_a_window_cache_keeps_less_in_the_prefix_cache(bounded: Graph, whole: Graph) -> None:
    stores = PrefixCache(1 << 24), PrefixCache(1 << 24)
    for graph, store in zip((bounded, whole), stores, strict=True):
        engine.prefill(graph, IDS, graph.base, store)
    assert stores[0].bytes < stores[1].bytes / 2


def test_a_batch_gives_each_row_its_own_answer(graph: Graph, whole: Graph) -> None:
    """Rows join with few and with many positions, leave one another behind, and go on from the prefix cache."""
    bounds = {name: (bound_in(graph, one), bound_in(whole, one)) for name, one in COUNTS.items()}
    prompts = [IDS[:30], IDS[:5], IDS[:90], [*IDS[:30], 4, 4]]
    store = PrefixCache(1 << 24)
    for _again in range(2):
        batch, rows = Batch(graph, 4, store), []
        for (here, there), prompt in zip(bounds.values(), prompts, strict=True):
            sampler = Sampler()
            row = batch.join(prompt, here, sampler=sampler, max_new_tokens=30, eos_ids=frozenset())
            rows.append((row, prompt, ids_of(whole, there, prompt)))
            for _ in range(5):
                batch.step()
        while batch.step():
            pass
        for row, prompt, wanted in rows:
            assert row.tokens[len(prompt) :] == wanted


def test_absorbed_entries_are_those_of_whole_caches(graph: Graph, whole: Graph) -> None:
    found, wanted = (prompt_entries(one, IDS[:60], LEAD, one.base) for one in (graph, whole))
    assert found.counts == wanted.counts == (WINDOW - 1, 60, WINDOW - 1)
    for layer in range(3):
        for part in KV_PARTS:
            assert np.abs(found.entries[layer, part] - wanted.entries[layer, part]).max() < CLOSE


def test_a_model_is_opened_with_window_caches(tiny_gemma_export: Path, cli: Cli) -> None:
    models = [PatchedModel.from_pretrained(tiny_gemma_export, "cpu", window_cache=on) for on in (False, True)]
    text = "a text that is much longer than the window of the model"
    wanted = models[0].generate(text, max_new_tokens=30)
    assert models[1].generate(text, max_new_tokens=30) == wanted
    common = ("generate", tiny_gemma_export, text, "--max-new-tokens", 30, "--device", "cpu")
    assert cli(*common, "--window-cache").out == cli(*common).out

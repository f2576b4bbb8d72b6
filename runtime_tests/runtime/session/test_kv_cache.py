"""A KV cache belongs to the session that made it, and to one request at a time; nobody waits and nothing is wrong."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.committed import private_copy
from runtime_tests.logits import furthest, graph_logits, token_ids
from tp_runtime.errors import BusyError, RequestError, StaleCacheError
from tp_runtime.generation import Batch, Sampler
from tp_runtime.model import PatchedModel
from tp_runtime.session import Graph, KVCache, ModelFolder, Use

IDS = token_ids(20)


@pytest.fixture(scope="module")
def graph(tiny_llama_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_llama_export), "cpu")


@pytest.fixture(scope="module")
def twin(tiny_llama_export: Path) -> Graph:
    """Another session over the same folder."""
    return Graph(ModelFolder.open(tiny_llama_export), "cpu")


@pytest.fixture(scope="module")
def concatenating(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(ModelFolder.open(private_copy("tiny-llama-optimum", tmp_path_factory.mktemp("export"))), "cpu")


@pytest.fixture(params=["fused", "optimum"])
def either(request: pytest.FixtureRequest, graph: Graph, concatenating: Graph) -> Graph:
    return graph if request.param == "fused" else concatenating


class Blocked:
    """Makes the next run of a graph wait for `go_on`, in the thread that runs it."""

    def __init__(self, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        run = graph._run

        def wait_and_run(*args: Any) -> Any:
            if not self.entered.is_set():
                self.entered.set()
                assert self.go_on.wait(60)
            return run(*args)

        monkeypatch.setattr(graph, "_run", wait_and_run)


# -- the session ---------------------------------------------------------------------------------------------


def test_a_cache_of_another_session_over_the_same_folder_is_refused_and_named(graph: Graph, twin: Graph) -> None:
    cache = twin.new_cache(twin.base)
    wanted = twin.forward(IDS, cache, twin.base)
    assert graph.base.key == twin.base.key
    for use in (lambda: graph.forward([1], cache, graph.base), lambda: graph.content(cache)):
        with pytest.raises(StaleCacheError) as error:
            use()
        assert twin.mark.name in str(error.value) and graph.mark.name in str(error.value)
        assert twin.mark.name != graph.mark.name
    assert cache.tokens == IDS
    cache.keep_prefix(IDS)
    assert furthest(twin.forward(IDS[-1:], cache, twin.base), wanted) < 1e-5


def test_a_cache_does_not_survive_a_model_that_is_opened_again(tiny_llama_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    cache = model.new_cache()
    model.generate("Hi", cache=cache, max_new_tokens=2)
    held = list(cache.tokens)
    again = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    with pytest.raises(StaleCacheError):
        again.stream("Hi", cache=cache)
    with pytest.raises(StaleCacheError):
        again.generate("Hi", cache=cache)
    assert cache.tokens == held and cache.uses.first() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_cannot_be_copied_or_pickled(graph: Graph, duplicate: Callable[[KVCache], Any]) -> None:
    cache = graph.new_cache(graph.base)
    graph.forward(IDS, cache, graph.base)
    with pytest.raises(RequestError, match="cannot be copied"):
        duplicate(cache)
    with pytest.raises(RequestError, match="cannot be copied"):
        copy.deepcopy({"conversation": cache})


def test_a_cache_that_was_rebuilt_from_the_fields_of_another_is_refused(graph: Graph) -> None:
    cache = graph.new_cache(graph.base)
    graph.forward(IDS, cache, graph.base)
    for made in (replace(cache), KVCache(graph.base.key)):
        with pytest.raises(StaleCacheError, match="no session"):
            graph.forward([1], made, graph.base)


def test_the_cache_of_a_batch_row_is_refused_after_the_batch_took_it_over(graph: Graph) -> None:
    batch = Batch(graph, 2)
    options: dict[str, Any] = {"sampler": Sampler(), "max_new_tokens": 4, "eos_ids": frozenset()}
    row, alone = (batch.join(IDS, graph.base, **options) for _ in range(2))
    batch.step()
    for _ in range(2):
        with pytest.raises(StaleCacheError, match="batch"):
            graph.forward([1], row.cache, graph.base)
        with pytest.raises(StaleCacheError, match="batch"):
            graph.content(row.cache)
        while batch.step():
            pass  # it is refused after the end too
    assert row.tokens == alone.tokens


# -- one request at a time -----------------------------------------------------------------------------------


def test_a_cache_in_another_thread_is_busy_at_once_and_unharmed(either: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = graph_logits(either, [*IDS, 5])
    cache = either.new_cache(either.base)
    blocked = Blocked(either, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(either.forward, IDS, cache, either.base, all_logits=True)
        assert blocked.entered.wait(60)
        for use in (
            lambda: either.forward([1], cache, either.base),
            lambda: either.forward([1, 2, 3], cache, either.base, all_logits=True),
            lambda: cache.keep_prefix([1, 2]),
            lambda: cache.take(Use(cache.uses)),
        ):
            with pytest.raises(BusyError) as error:
                use()  # the other run cannot end before this returns
            assert error.value.field == "cache"
        other = either.forward(IDS, either.new_cache(either.base), either.base, all_logits=True)  # its own cache
        blocked.go_on.set()
        assert np.array_equal(running.result(60), other)
    assert cache.tokens == IDS
    assert furthest(either.forward([5], cache, either.base), wanted[-1:]) < 1e-5


def test_a_run_that_fails_or_is_refused_frees_its_cache(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = graph.new_cache(graph.base)
    with pytest.raises(RequestError):
        graph.forward([-1], cache, graph.base)
    with monkeypatch.context() as patched:
        patched.setattr(graph, "_run", lambda *_a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            graph.forward([1], cache, graph.base)
    assert cache.uses.first() is None
    graph.forward(IDS, cache, graph.base)


def test_a_thread_that_dies_while_it_holds_a_cache_frees_it(graph: Graph) -> None:
    cache = graph.new_cache(graph.base)

    def take_and_die() -> None:
        held = Use(cache.uses)
        cache.take(held)
        assert held in cache.uses
        raise ZeroDivisionError

    def work() -> None:
        with pytest.raises(ZeroDivisionError):
            take_and_die()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    graph.forward(IDS, cache, graph.base)


def test_only_the_use_that_holds_the_cache_gives_access(graph: Graph) -> None:
    cache, other = graph.new_cache(graph.base), graph.new_cache(graph.base)
    held = Use(cache.uses)
    cache.take(held)
    graph.forward(IDS, cache, graph.base, held=held)
    assert held in cache.uses  # a run under a use does not end it
    with pytest.raises(BusyError):
        graph.forward(IDS, other, graph.base, held=held)
    held.end()
    with pytest.raises(BusyError):
        graph.forward([1], cache, graph.base, held=held)
    graph.forward([1], cache, graph.base)


def test_threads_that_fight_for_one_cache_never_get_a_wrong_answer(either: Graph) -> None:
    """Every attempt ends as the right logits or as a BusyError, and each thread gets its turn in the end."""
    prompts = [token_ids(6, seed=seed) for seed in range(3)]
    wanted = [graph_logits(either, prompt)[-1] for prompt in prompts]
    cache, refusals = either.new_cache(either.base), threading.Semaphore(0)
    first = Use(cache.uses)
    cache.take(first)  # so the threads begin with refusals

    def fight(which: int) -> int:
        served = 0
        while served < 15:
            held = Use(cache.uses)
            try:
                cache.take(held)
            except BusyError:
                refusals.release()
                time.sleep(0)  # another thread may run
                continue
            try:
                kept = cache.keep_prefix(prompts[which], held)
                got = either.forward(prompts[which][kept:], cache, either.base, held=held)[-1]
            finally:
                held.end()
            assert furthest(got, wanted[which]) < 1e-4
            served += 1
            time.sleep(0.0005)  # another thread's turn
        return served

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(fight, which) for which in range(3)]
        try:
            assert all(refusals.acquire(timeout=60) for _ in range(3))
        finally:
            first.end()
        assert [future.result(60) for future in futures] == [15] * 3
    assert cache.uses.first() is None

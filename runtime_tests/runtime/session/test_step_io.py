"""Decode steps write their inputs in place: what an earlier step left there never shows, however the cache moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime_tests.logits import furthest, graph_logits, token_ids
from tp_runtime.session import Graph, KVCache, ModelFolder

IDS = token_ids(300, seed=3)


@pytest.fixture(scope="module", params=["tiny_llama_export", "tiny_gemma_export"])
def graph(request: pytest.FixtureRequest) -> Graph:
    return Graph(ModelFolder.open(request.getfixturevalue(request.param)), "cpu", threads=1)


def step(graph: Graph, cache: KVCache, token: int) -> np.ndarray:
    return graph.forward([token], cache, graph.base)


def filled(graph: Graph, count: int) -> KVCache:
    cache = graph.new_cache(graph.base)
    graph.forward(IDS[:count], cache, graph.base)
    return cache


def test_steps_after_rewinds_of_any_length_give_the_logits_of_one_run(graph: Graph) -> None:
    cache, rng = filled(graph, 40), np.random.default_rng(0)
    wanted = graph_logits(graph, IDS[:60])
    for _ in range(12):
        del cache.tokens[int(rng.integers(0, len(cache))) :]
        for at in range(len(cache), min(len(cache) + int(rng.integers(1, 20)), 60)):
            assert furthest(step(graph, cache, IDS[at]), wanted[at : at + 1]) < 1e-5


def test_a_step_in_a_new_cache_is_a_step_at_the_first_position(graph: Graph) -> None:
    cache, wanted = graph.new_cache(graph.base), graph_logits(graph, IDS[:3])
    for at in range(3):
        assert furthest(step(graph, cache, IDS[at]), wanted[at : at + 1]) < 1e-5


def test_steps_go_on_when_the_buffers_grow_and_when_longer_runs_come_between(graph: Graph) -> None:
    cache, wanted = filled(graph, 250), graph_logits(graph, IDS)
    for at in range(250, 270):  # the buffers have 256 places first
        assert furthest(step(graph, cache, IDS[at]), wanted[at : at + 1]) < 1e-5
    graph.forward(IDS[270:280], cache, graph.base)
    for at in range(280, 290):
        assert furthest(step(graph, cache, IDS[at]), wanted[at : at + 1]) < 1e-5


@pytest.mark.parametrize("runs", [False, True], ids=["before the run", "after the run"])
def test_a_step_that_fails_can_be_repeated_or_followed_by_a_rewind(
    graph: Graph, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def run_with_iobinding(self, binding: Any) -> None:
            if runs:
                session.run_with_iobinding(binding)
            raise MemoryError

    session, cache, wanted = graph.session, filled(graph, 20), graph_logits(graph, IDS[:30])
    step(graph, cache, IDS[20])
    for rewound in (21, 15):
        with monkeypatch.context() as failing:
            failing.setattr(graph, "session", Failing())
            with pytest.raises(MemoryError):
                step(graph, cache, IDS[5])
        assert cache.tokens == IDS[:21]
        del cache.tokens[rewound:]
        for at in range(rewound, 25):
            assert furthest(step(graph, cache, IDS[at]), wanted[at : at + 1]) < 1e-5
        del cache.tokens[21:]


def test_a_session_binds_nothing_from_the_second_step_on(graph: Graph) -> None:
    cache = filled(graph, 20)
    step(graph, cache, IDS[20])
    assert cache.step is not None
    before = cache.step
    for at in range(21, 40):
        step(graph, cache, IDS[at])
    assert cache.step is before

"""Failures within a completion: a conversation that goes on in the same cache gets the ids of a fresh cache."""

from __future__ import annotations

from functools import partial
from itertools import count

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.failures import Failure
from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import PrefixCache, Sampler, Sampling, generate
from tp_runtime.session import BoundPatch, Graph, KVCache, ModelFolder

LEAD = [5, 6, 7]
# The prompts of a conversation: the buffers grow, the conversation is taken back, goes on otherwise, and grows again.
TURNS = [
    [*LEAD, 9],
    [*LEAD, 9, *token_ids(250, seed=1)],
    [*LEAD, 9, *token_ids(250, seed=1)[:8], 3],
    [*LEAD, 9, *token_ids(255, seed=2)],
]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-llama-optimum"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A graph whose runs append to the cache in place, and one whose runs return a new, longer cache."""
    folder = ModelFolder.open(private_copy(request.param, tmp_path_factory.mktemp("export")))
    return Graph(folder, "cpu", threads=1)


def complete(
    graph: Graph, prompt: list[int], bound: BoundPatch, cache: KVCache | None, store: PrefixCache | None = None
) -> list[int]:
    sampling = Sampling(temperature=1.5, seed=len(prompt))
    more = {"max_new_tokens": 2, "eos_ids": frozenset(), "cache": cache, "prefix_cache": store}
    return list(generate(graph, prompt, bound, sampler=Sampler(sampling), **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["lines", "calls"])
def test_a_conversation_goes_on_after_a_failure_anywhere(
    graph: Graph, kind: str, error: type[BaseException], every: int = 43
) -> None:
    folder = graph.folder
    prefixed = graph.bind(with_prefix(patch_for(folder, seed=1, scale=0.3), folder, LEAD))
    for bound in (graph.base, prefixed):
        wanted = [complete(graph, prompt, bound, None) for prompt in TURNS]
        for turn in range(len(TURNS)):
            for at in count(turn, every):
                cache, failure, failed = graph.new_cache(bound), Failure(kind, at, error), False
                for number, prompt in enumerate(TURNS):
                    if number == turn:
                        try:
                            failure.run(partial(complete, graph, prompt, bound, cache))
                            break  # the turn has fewer points
                        except error:
                            failed = True
                        if at % 2:
                            continue  # the conversation goes on without this turn
                    assert complete(graph, prompt, bound, cache) == wanted[number], f"turn {turn}, point {at}"
                if not failed:
                    break


@pytest.mark.parametrize("kind", ["lines", "calls"])
def test_a_prefix_cache_never_keeps_the_wrong_entries_after_a_failure(graph: Graph, kind: str, every: int = 43) -> None:
    wanted = [complete(graph, prompt, graph.base, None) for prompt in TURNS[:3]]
    for turn in (0, 2):
        for at in count(turn, every):
            store, failure, failed = PrefixCache(1 << 22), Failure(kind, at), False
            for number, prompt in enumerate(TURNS[:3]):
                if number == turn:
                    try:
                        failure.run(partial(complete, graph, prompt, graph.base, None, store))
                        break
                    except KeyboardInterrupt:
                        failed = True
                assert complete(graph, prompt, graph.base, None, store) == wanted[number], f"turn {turn}, point {at}"
            if not failed:
                break


def test_a_completion_goes_on_if_the_prefix_cache_cannot_store_it(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PrefixCache, "keep", fail)
    store = PrefixCache(1 << 20)
    assert complete(graph, TURNS[0], graph.base, None, store) == complete(graph, TURNS[0], graph.base, None)
    assert "could not store" in caplog.text and store.entries == 0

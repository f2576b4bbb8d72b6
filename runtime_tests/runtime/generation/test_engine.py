"""The generation loop on a fake graph: no weights, no ONNX Runtime."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.fake_graph import BASE, PATCH, VOCAB, FakeGraph, expected, next_token
from tp_runtime.errors import BusyError, RequestError, StaleCacheError
from tp_runtime.generation import Sampler, Sampling, engine
from tp_runtime.session import BoundPatch, KVCache


def start(
    graph: FakeGraph,
    prompt: Sequence[int],
    bound: BoundPatch = BASE,
    max_new_tokens: Any = 8,
    eos: Sequence[int] = (),
    cache: KVCache | None = None,
    **sampling: Any,
) -> Generator[int]:
    return engine.generate(
        graph,
        prompt,
        bound,
        sampler=Sampler(Sampling(**sampling)),
        max_new_tokens=max_new_tokens,
        eos_ids=frozenset(eos),
        cache=cache,
    )


def test_greedy_generation_runs_the_graph_once_per_token() -> None:
    graph = FakeGraph()
    assert list(start(graph, [3, 1, 4])) == expected([3, 1, 4], 8)
    # The graph runs the prompt at once, then single tokens; the last id of the completion is never run.
    assert graph.runs == [[3, 1, 4], *([token] for token in expected([3, 1, 4], 7))]


def test_every_step_applies_the_patch() -> None:
    ids = list(start(FakeGraph(), [3, 1, 4], PATCH))
    assert ids == expected([3, 1, 4], 8, PATCH) != expected([3, 1, 4], 8)


def test_generation_stops_at_an_eos_id_and_yields_it() -> None:
    graph, whole = FakeGraph(), expected([3, 1, 4], 8)
    eos = whole[4]
    stop = whole.index(eos) + 1
    assert list(start(graph, [3, 1, 4], eos=[49, eos] if 49 not in whole else [eos])) == whole[:stop]
    assert len(graph.runs) == stop


@given(length=st.integers(1, 15), limit=st.integers(1, 40), window=st.just(16))
def test_prompt_and_completion_stay_within_the_window(length: int, limit: int, window: int) -> None:
    prompt = list(range(length))
    ids = list(start(FakeGraph(window), prompt, max_new_tokens=limit))
    assert ids == expected(prompt, min(limit, window - length))


@pytest.mark.parametrize(
    ("prompt", "limit", "field"),
    [
        ([], 8, "prompt"),
        (range(64), 8, "prompt"),
        (range(90), 8, "prompt"),
        ([1], 0, "max_new_tokens"),
        ([1], -1, "max_new_tokens"),
        ([1], 2.0, "max_new_tokens"),
        ([1], True, "max_new_tokens"),
        ([1], None, "max_new_tokens"),
        ([1], "8", "max_new_tokens"),
    ],
)
def test_bad_requests_name_the_field_before_anything_runs(prompt: Any, limit: Any, field: str) -> None:
    graph = FakeGraph(64)
    cache = graph.new_cache(BASE)
    cache.tokens[:] = [9, 9]
    with pytest.raises(RequestError) as error:
        start(graph, list(prompt), max_new_tokens=limit, cache=cache)
    assert error.value.field == field
    assert graph.runs == [] and cache.tokens == [9, 9]


def test_nothing_runs_before_the_first_id_is_asked_for() -> None:
    graph = FakeGraph()
    ids = start(graph, [3, 1, 4])
    assert graph.runs == []
    next(ids)
    assert graph.runs == [[3, 1, 4]]
    next(ids)
    assert len(graph.runs) == 2


def test_the_callers_prompt_is_not_changed() -> None:
    prompt = [3, 1, 4]
    list(start(FakeGraph(), prompt))
    assert prompt == [3, 1, 4]


def test_sampling_is_repeatable() -> None:
    one, two, other = (list(start(FakeGraph(), [3, 1, 4], temperature=3.0, seed=seed)) for seed in (1, 1, 2))
    assert one == two != other


@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30))
def test_the_sampler_sees_prompt_and_completion(prompt: list[int]) -> None:
    """The second most likely id replaces a most likely id that was seen before, unless it was seen too."""
    tokens = list(prompt)
    for _ in range(8):
        first = next_token(tokens, BASE)
        second = (first + 1) % VOCAB
        tokens.append(second if first in tokens and second not in tokens else first)
    assert list(start(FakeGraph(), prompt, repetition_penalty=2.0)) == tokens[len(prompt) :]


# -- caches --------------------------------------------------------------------------------------------------


def test_a_conversation_runs_only_its_new_tokens() -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    first = list(start(graph, [3, 1, 4], cache=cache))
    graph.runs.clear()
    prompt = [3, 1, 4, *first, 15, 9]
    assert list(start(graph, prompt, cache=cache)) == expected(prompt, 8)
    assert graph.runs[0] == [first[-1], 15, 9]  # the last id of the completion was not run before


def test_the_same_prompt_again_runs_its_last_token() -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    list(start(graph, [3, 1, 4], cache=cache))
    graph.runs.clear()
    assert list(start(graph, [3, 1, 4], cache=cache)) == expected([3, 1, 4], 8)
    assert graph.runs[0] == [4]


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(conversation=st.lists(prompts, min_size=1, max_size=4))
def test_a_cache_never_changes_the_completion(conversation: list[list[int]]) -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    for prompt in conversation:
        held = list(cache.tokens)
        graph.runs.clear()
        assert list(start(graph, prompt, max_new_tokens=3, cache=cache)) == expected(prompt, 3)
        common = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), len(held))
        assert graph.runs[0] == prompt[min(common, len(prompt) - 1) :]  # only the ids that the cache lacks are run
        assert cache.tokens == [*prompt, *expected(prompt, 2)]


def test_a_second_completion_on_one_cache_is_refused_at_once_and_the_first_goes_on() -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    one, early = start(graph, [3, 1, 4], cache=cache), start(graph, [3, 2], cache=cache)
    taken = [next(one)]
    with pytest.raises(BusyError) as error:
        next(early)  # it was made before the other began
    assert error.value.field == "cache"
    with pytest.raises(BusyError):
        start(graph, [3, 2], cache=cache)
    with pytest.raises(BusyError):
        graph.forward([5], cache, BASE)
    assert taken + list(one) == expected([3, 1, 4], 8)
    assert list(start(graph, [3, 2], cache=cache)) == expected([3, 2], 8)  # the end of the first freed the cache


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_completion_that_ends_early_frees_its_cache(end: str) -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    one = start(graph, [3, 1, 4], cache=cache)
    next(one)
    if end == "close":
        one.close()
    else:
        del one
    assert list(start(graph, [3, 2], cache=cache)) == expected([3, 2], 8)


def test_a_completion_that_never_began_does_not_use_its_cache() -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    waiting = start(graph, [3, 1, 4], cache=cache)
    assert list(start(graph, [3, 2], cache=cache)) == expected([3, 2], 8)
    assert list(waiting) == expected([3, 1, 4], 8)


def test_a_cache_of_another_patch_is_refused_and_not_changed() -> None:
    graph = FakeGraph()
    cache = graph.new_cache(PATCH)
    first = list(start(graph, [3, 1, 4], PATCH, cache=cache))
    held, runs = list(cache.tokens), len(graph.runs)
    with pytest.raises(StaleCacheError, match="no patch"):
        start(graph, [8, 8], BASE, cache=cache)
    assert cache.tokens == held and len(graph.runs) == runs
    prompt = [3, 1, 4, *first, 5]
    assert list(start(graph, prompt, PATCH, cache=cache)) == expected(prompt, 8, PATCH)


def test_a_cache_key_distinguishes_patches_strengths_order_and_graphs() -> None:
    keys = [
        ("graph", ()),
        ("graph", (("p", 1.0),)),
        ("graph", (("p", 0.5),)),
        ("graph", (("q", 1.0),)),
        ("graph", (("p", 1.0), ("q", 1.0))),
        ("graph", (("q", 1.0), ("p", 1.0))),
        ("other", (("p", 1.0),)),
    ]
    for made in keys:
        for wanted in keys:
            cache = KVCache(made)
            if made == wanted:
                cache.require_key(wanted)
            else:
                with pytest.raises(StaleCacheError):
                    cache.require_key(wanted)


def test_a_cache_is_still_usable_after_a_failed_step() -> None:
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    ids = start(graph, [3, 1, 4], cache=cache)
    next(ids)
    forward, graph.forward = graph.forward, lambda *_a, **_k: (_ for _ in ()).throw(MemoryError())  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        next(ids)
    graph.forward = forward  # type: ignore[method-assign]
    assert list(start(graph, [3, 1, 4], cache=cache)) == expected([3, 1, 4], 8)

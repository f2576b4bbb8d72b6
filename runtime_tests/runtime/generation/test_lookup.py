"""Drafts from the request's own text, and the loop that verifies them, on a fake graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.drafts import Scripted
from runtime_tests.fake_graph import BASE, PATCH, VOCAB, FakeGraph, expected
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.generation import LookupStats, PrefixCache, Sampler, Sampling, engine
from tp_runtime.generation.lookup import FLOAT_COST, QUANTISED_COST, Drafter, RunCost
from tp_runtime.session import BoundPatch, KVCache

PROMPT = [3, 1, 4]
FREE = RunCost(0.0, 0.0, 0.0)
scripts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6)


def oracle(script: Sequence[tuple[int, int]], bound: BoundPatch = BASE) -> Scripted:
    return Scripted(lambda tokens, count: expected(tokens, count, bound), script, VOCAB)


def start(
    graph: FakeGraph,
    prompt: Sequence[int] = PROMPT,
    bound: BoundPatch = BASE,
    max_new_tokens: int = 8,
    eos: Sequence[int] = (),
    sampling: Sampling | None = None,
    lookup: int = 8,
    **options: Any,
) -> Generator[int]:
    return engine.generate(
        graph,
        prompt,
        bound,
        sampler=Sampler(sampling),
        max_new_tokens=max_new_tokens,
        eos_ids=frozenset(eos),
        lookup=lookup,
        **options,
    )


# -- verification --------------------------------------------------------------------------------------------


@given(script=scripts, count=st.integers(1, 20), window=st.integers(4, 30), eos=st.integers(0, VOCAB - 1))
def test_no_draft_changes_the_ids_or_what_the_cache_holds_at_the_end(
    script: list[tuple[int, int]], count: int, window: int, eos: int
) -> None:
    wanted = expected(PROMPT, min(count, window - len(PROMPT)))
    wanted = wanted[: wanted.index(eos) + 1] if eos in wanted else wanted
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "Drafter", oracle(script))
        graph = FakeGraph(window)
        cache = graph.new_cache(BASE)
        assert list(start(graph, max_new_tokens=count, eos=[eos], cache=cache)) == wanted
    assert cache.tokens == [*PROMPT, *wanted[:-1]]


@given(script=scripts, read=st.integers(1, 12))
def test_a_completion_that_is_closed_leaves_nothing_of_a_draft_in_the_cache(
    script: list[tuple[int, int]], read: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "Drafter", oracle(script))
        graph = FakeGraph()
        cache = graph.new_cache(BASE)
        ids = start(graph, max_new_tokens=20, cache=cache)
        got = [next(ids) for _ in range(read)]
        ids.close()
        assert got == expected(PROMPT, read) and cache.tokens == [*PROMPT, *got[:-1]]
        prompt = [*PROMPT, *got, 9]
        assert list(start(graph, prompt, max_new_tokens=5, cache=cache)) == expected(prompt, 5)


def test_right_drafts_save_runs_and_wrong_ones_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, runs, drafted, accepted in (([(3, 0)], 4, 8, 8), ([(0, 3)], 12, 27, 0), ([(2, 1)], 5, 10, 7)):
        monkeypatch.setattr(engine, "Drafter", oracle(script))
        graph, stats = FakeGraph(), LookupStats()
        assert list(start(graph, max_new_tokens=12, stats=stats)) == expected(PROMPT, 12)
        assert (stats.runs, stats.drafted, stats.accepted) == (len(graph.runs), drafted, accepted)
        assert len(graph.runs) == runs


def test_a_draft_never_reaches_beyond_the_last_id_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Drafter", oracle([(40, 0)]))
    graph = FakeGraph(20)
    assert list(start(graph, max_new_tokens=90)) == expected(PROMPT, 17)
    assert sum(map(len, graph.runs)) == 19  # every id but the last one is run once


def test_the_patch_and_the_cache_are_those_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Drafter", oracle([(2, 2)], PATCH))
    assert list(start(FakeGraph(), bound=PATCH)) == expected(PROMPT, 8, PATCH)


def test_a_run_that_fails_leaves_a_cache_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Drafter", oracle([(2, 2)]))
    graph = FakeGraph()
    cache = graph.new_cache(BASE)
    ids = start(graph, cache=cache)
    got = [next(ids) for _ in range(4)]
    with monkeypatch.context() as broken:
        broken.setattr(graph, "forward", lambda *_args, **_options: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            list(ids)
    assert cache.tokens == [*PROMPT, *got][: len(cache)]
    assert list(start(graph, cache=cache)) == expected(PROMPT, 8)


def test_ids_before_a_bad_row_are_handed_out_as_without_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(FakeGraph):
        def forward(self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, **options: Any) -> np.ndarray:
            logits = super().forward(tokens, cache, bound, **options)
            for row in range(len(logits)):
                if len(cache) - len(logits) + 1 + row >= len(PROMPT) + 4:
                    logits[row] = np.nan
            return logits

    monkeypatch.setattr(engine, "Drafter", oracle([(6, 0)]))
    for lookup in (0, 8):
        graph, got = Overflowing(), []
        cache = graph.new_cache(BASE)
        with pytest.raises(ModelFormatError):
            for token in start(graph, lookup=lookup, cache=cache):
                got.append(token)
        assert got == expected(PROMPT, 4) and cache.tokens == [*PROMPT, *got[:-1]]


@pytest.mark.parametrize("lookup", [-1, 65, 10**30, 1.5, True, None, "3"])
def test_a_bad_number_is_refused_before_anything_runs(lookup: Any) -> None:
    graph = FakeGraph()
    with pytest.raises(RequestError) as error:
        start(graph, lookup=lookup)
    assert error.value.field == "lookup" and not graph.runs


def test_the_prefix_cache_keeps_nothing_of_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Drafter", oracle([(1, 3)]))

    class Graph(FakeGraph):
        def content(self, cache: KVCache) -> dict[str, np.ndarray]:
            return {"past": np.array(cache.tokens, np.int64)[None, :, None]}

    for read in range(1, 9):
        store = PrefixCache(10_000)
        ids = start(Graph(), prefix_cache=store)
        got = [next(ids) for _ in range(read)]
        ids.close()
        assert store.bytes == 8 * (len(PROMPT) + len(got) - 1)


# -- sampling ------------------------------------------------------------------------------------------------


class Sure(FakeGraph):
    """A graph with the same four likely ids everywhere."""

    weights = np.array([0.4, 0.3, 0.2, 0.1])

    def forward(self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, **options: Any) -> np.ndarray:
        logits = super().forward(tokens, cache, bound, **options)
        logits[:] = -np.inf
        logits[:, :4] = np.log(self.weights)
        return logits


def test_the_same_seed_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in ([(0, 4)], [(3, 1)], [(5, 0), (0, 1), (1, 2)]):
        monkeypatch.setattr(engine, "Drafter", oracle(script))
        for seed in range(20):
            sampling = Sampling(temperature=3.0, seed=seed, repetition_penalty=1.3)
            plain = list(start(FakeGraph(), sampling=sampling, lookup=0))
            assert list(start(FakeGraph(), sampling=sampling)) == plain


def test_sampled_ids_have_the_distribution_of_the_model_whatever_is_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi squared of 3,000 completions of two ids after the first one, against the exact probabilities."""
    count, wanted = 3000, np.outer(Sure.weights, Sure.weights).ravel()
    for drafted in ([0, 0, 0], [3, 3, 3], [0, 3, 1]):
        monkeypatch.setattr(engine, "Drafter", Scripted(lambda _tokens, n, ids=drafted: ids[:n], [(3, 0)], VOCAB))
        found: Counter[tuple[int, ...]] = Counter()
        for seed in range(count):
            ids = list(start(Sure(), max_new_tokens=3, sampling=Sampling(temperature=1.0, seed=seed)))
            found[tuple(ids[1:])] += 1
        got = np.array([found[first, second] for first in range(4) for second in range(4)])
        assert got.sum() == count
        assert ((got - count * wanted) ** 2 / (count * wanted)).sum() < 37.7  # 15 degrees of freedom, 1 in 1,000


# -- the drafter ---------------------------------------------------------------------------------------------


def drafts(tokens: Sequence[int], most: int = 8, cost: RunCost = FREE, room: int = 100) -> list[int]:
    return Drafter(most, cost).draft(tokens, room)


def test_what_followed_the_last_ids_is_drafted() -> None:
    assert drafts([1, 2, 3, 4, 5, 6, 9, 2, 3], most=3) == [4, 5, 6]
    assert drafts([1, 2, 3, 4, 5, 6, 9, 2, 3], most=3, room=2) == [4, 5]
    assert drafts([1, 2, 3, 4, 5, 6, 9, 3]) == []  # one id is no match
    assert drafts([1, 2, 3, 4]) == drafts([1]) == drafts([1, 2, 1, 2, 1], room=0) == []


def test_the_longest_match_and_then_the_latest_one_is_taken() -> None:
    assert drafts([1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3], most=1) == [4]
    assert drafts([7, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3], most=1) == [5]


def test_text_that_repeats_itself_is_drafted_over_its_end() -> None:
    assert drafts([1, 2, 3, 1, 2, 3], most=7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafts([5, 5, 5], most=4) == [5, 5, 5, 5]


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60), cut=st.integers(1, 60), most=st.integers(1, 9))
def test_reading_bit_by_bit_finds_copies_that_agree_with_the_last_ids(tokens: list[int], cut: int, most: int) -> None:
    drafter, known = Drafter(most, FREE), tokens[:cut]
    for end in range(min(cut, len(tokens)), len(tokens) + 1):
        known = tokens[:end]
        draft = drafter.draft(known, 100)
        assert len(draft) <= most and len(draft) == len(drafter.draft(known, 100))
        if draft:
            places = [i for i in range(2, end) if known[i - 2 : i] == known[-2:]]
            assert any(draft == [known[i + j % (end - i)] for j in range(len(draft))] for i in places)


def decoded(cost: RunCost, tokens: list[int], prompt: int, most: int = 8) -> list[tuple[int, int]]:
    """Return for each run after the first id how many ids are drafted and how many of them are right."""
    drafter, runs, end = Drafter(most, cost), [], prompt + 1
    while end < len(tokens):
        draft = drafter.draft(tokens[:end], len(tokens) - end - 1)
        pairs = enumerate(zip(draft, tokens[end:], strict=False))
        right = next((place for place, (drafted, token) in pairs if drafted != token), len(draft))
        runs.append((len(draft), right))
        end += right + 1
    return runs


def test_a_copy_in_progress_is_drafted_further_and_one_that_ended_is_not() -> None:
    rng = np.random.default_rng(0)
    source, other = rng.integers(0, 1000, 60).tolist(), rng.integers(1000, 2000, 40).tolist()
    runs = decoded(FLOAT_COST, [*source, 2001, *source[:50], *other], 60, most=16)
    lengths = [drafted for drafted, _right in runs]
    assert lengths[:2] == [0, 0] and 0 < lengths[2] < lengths[3] <= 16
    assert len(lengths) < 10 + len(other) and not any(lengths[1 - len(other) :])


def added_time(cost: RunCost, tokens: list[int], prompt: int) -> float:
    """Return how much longer a completion takes with drafts of up to 8 ids, in runs of one id, by the cost of runs."""
    runs = decoded(cost, tokens, prompt)
    return sum(cost.added(drafted) - right for drafted, right in runs if drafted)


@given(vocab=st.sampled_from([3, 6, 10, 14, 30]), count=st.integers(20, 300), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_text_in_which_copies_are_wrong_costs_at_most_a_small_share(vocab: int, count: int, seed: int) -> None:
    """In a small vocabulary the last ids have always occurred before, and what followed them says nothing."""
    tokens = np.random.default_rng(seed).integers(0, vocab, 400 + count).tolist()
    for cost in (FLOAT_COST, QUANTISED_COST):
        assert added_time(cost, tokens, 400) <= 1 + 0.02 * count


def test_drafting_begins_again_when_copies_are_right_again() -> None:
    """No run is spent on finding out: the ids that come next show what a draft would have been worth."""
    rng = np.random.default_rng(1)
    source, noise = rng.integers(100, 999, 60).tolist(), rng.integers(0, 10, 500).tolist()
    tokens = [*source, *noise]
    for cost in (FLOAT_COST, QUANTISED_COST):
        assert added_time(cost, tokens, 200) > 0
        assert added_time(cost, [*tokens, *source], len(tokens) - 300) < -25


def test_dearer_runs_get_shorter_drafts() -> None:
    tokens = [*range(20), 50, 3, 4, 5]
    assert (
        len(drafts(tokens, cost=FREE)) > len(drafts(tokens, cost=FLOAT_COST)) > len(drafts(tokens, cost=QUANTISED_COST))
    )
    assert drafts(tokens, cost=RunCost(3.0, 3.0, 3.0)) == []

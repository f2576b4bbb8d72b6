"""Ids that a constraint forces: they go through the model in one run, with drafts and without."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime_tests.committed import private_copy
from runtime_tests.drafts import Scripted, after
from runtime_tests.fake_graph import BASE, VOCAB, FakeGraph, next_token
from tp_runtime.generation import LookupStats, Sampler, Sampling, WantedLogprobs, engine
from tp_runtime.model import PatchedModel

PROMPT = [3, 1, 4]
END = 49


class Template:
    """Forces the ids of a template and leaves its gaps (None) to the model, except for the id that ends a completion.

    After the template the completion must end.
    """

    def __init__(self, template: Sequence[int | None]) -> None:
        self.template, self.done = [*template, END], 0

    def follow(self, completion: Sequence[int]) -> None:
        for token, wanted in zip(completion, self.template, strict=False):
            assert token == wanted or (wanted is None and token != END)
        self.done = len(completion)

    def allows(self, token: int) -> bool:
        wanted = self.template[self.done]
        return token == wanted or (wanted is None and token != END)

    def allowed(self) -> NDArray[np.uint32]:
        bits = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in range(VOCAB):
            if self.allows(token):
                bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def forced(self) -> list[int]:
        rest = self.template[self.done :]
        return [token for token in rest[: rest.index(None) if None in rest else None] if token is not None]


def start(
    graph: FakeGraph,
    template: Sequence[int | None],
    max_new_tokens: int = 30,
    logprobs: int | None = None,
    lookup: int = 0,
    sampling: Sampling | None = None,
    **options: Any,
) -> tuple[Sampler, Generator[int]]:
    wanted = None if logprobs is None else WantedLogprobs(logprobs)
    ends = frozenset({END})
    sampler = Sampler(sampling, ends, Template(template), wanted)
    options |= {"sampler": sampler, "max_new_tokens": max_new_tokens, "eos_ids": ends, "lookup": lookup}
    return sampler, engine.generate(graph, PROMPT, BASE, **options)


def filled(template: Sequence[int | None]) -> list[int]:
    """Return the greedy completion."""
    tokens = list(PROMPT)
    for wanted in template:
        first = next_token(tokens, BASE)
        if wanted is None:
            tokens.append(first if first != END else 0)
        else:
            tokens.append(wanted)
    return [*tokens[len(PROMPT) :], END]


def test_forced_ids_run_together_with_the_id_before_them_and_the_end_needs_no_run() -> None:
    graph, template = FakeGraph(), [7, 8, None, 9, 10, 11, None, None, 12]
    cache = graph.new_cache(BASE)
    _sampler, ids = start(graph, template, cache=cache)
    got = list(ids)
    assert got == filled(template)
    first, second, third = (got[place] for place in (2, 6, 7))
    assert graph.runs == [[*PROMPT, 7, 8], [first, 9, 10, 11], [second]]
    assert third == got[7] and cache.tokens == [*PROMPT, *got[:7]]


def test_forced_ids_end_at_the_limit_and_at_the_window() -> None:
    template = [7, 8, None, *range(20, 40)]
    for window, limit in ((64, 9), (len(PROMPT) + 9, 30)):
        _sampler, ids = start(FakeGraph(window), template, limit)
        assert list(ids) == filled(template)[:9]
    for limit in (1, 2):
        _sampler, ids = start(FakeGraph(), template, limit)
        assert list(ids) == [7, 8][:limit]


def test_a_completion_that_is_closed_within_forced_ids_leaves_a_cache_that_goes_on() -> None:
    template = [7, 8, None, 9, 10, 11, None]
    for read in range(1, 8):
        graph = FakeGraph()
        cache = graph.new_cache(BASE)
        _sampler, ids = start(graph, template, cache=cache)
        got = [next(ids) for _ in range(read)]
        ids.close()
        assert cache.tokens == [*PROMPT, *got][: len(cache)] and len(cache) < len(PROMPT) + read
        _sampler, ids = start(graph, template, cache=cache)
        assert list(ids) == filled(template)


def test_log_probabilities_of_forced_ids_are_those_of_steps_of_one_id() -> None:
    template = [7, 8, None, 9, 10, 11, None, 12]
    graph = FakeGraph()
    sampler, ids = start(graph, template, logprobs=3)
    got = list(ids)
    assert got == filled(template)
    alone = Sampler(None, (), Template(template), WantedLogprobs(3))
    for place in range(len(got)):
        logits = FakeGraph().forward([*PROMPT, *got[:place]], FakeGraph().new_cache(BASE), BASE)
        alone.pick(logits[-1], [*PROMPT, *got[:place]], place)
    assert sampler.logprobs == alone.logprobs and len(sampler.logprobs) == len(got)
    assert [len(run) for run in graph.runs] == [5, 4, 3]  # the forced ids are still run together


templates = st.lists(st.one_of(st.none(), st.none(), st.integers(0, 5)), max_size=14)
scripts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5)


@given(
    template=templates, script=scripts, limit=st.integers(1, 20), logprobs=st.sampled_from([None, 2]), hot=st.booleans()
)
def test_drafts_and_forced_ids_together_give_the_ids_of_single_steps(
    template: list[int | None], script: list[tuple[int, int]], limit: int, logprobs: int | None, hot: bool
) -> None:
    sampling = Sampling(temperature=2.0, seed=5) if hot else None
    plain, ids = start(FakeGraph(), template, limit, 0, sampling=sampling)
    wanted = list(ids)
    if not hot:
        assert wanted == filled(template)[:limit]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "Drafter", Scripted(after([*PROMPT, *wanted], VOCAB), script, VOCAB))
        graph, stats = FakeGraph(), LookupStats()
        cache = graph.new_cache(BASE)
        sampler, ids = start(graph, template, limit, logprobs, 8, sampling, cache=cache, stats=stats)
        assert list(ids) == wanted
    assert cache.tokens == [*PROMPT, *wanted][: len(cache)] and len(cache) < len(PROMPT) + len(wanted)
    assert stats.accepted <= stats.drafted and stats.runs == len(graph.runs)
    if logprobs is not None:
        assert [one.token for one in sampler.logprobs] == wanted
        assert [one.logprob for one in sampler.logprobs] == [one.logprob for one in plain.logprobs]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-optimum", "tiny-gemma"])
def test_a_real_grammar_gives_the_same_text_with_drafts_and_in_single_steps(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    model = PatchedModel.from_pretrained(private_copy(name, tmp_path), "cpu", threads=1)
    graph, codec = model.graph, model.codec
    schema = {
        "type": "object",
        "properties": {
            "name": {"const": "Ann of the hill"},
            "again": {"const": "Ann of the hill"},
            "n": {"enum": [1, 22]},
        },
        "required": ["name", "again", "n"],
        "additionalProperties": False,
    }
    grammar = codec.grammars(graph.folder.vocab_size).compile(json_schema=schema)
    prompt = codec.render("Ann of the hill")
    texts, runs = [], []
    for lookup, wanted in ((0, None), (8, None), (8, WantedLogprobs(1))):
        sampler = Sampler(Sampling(temperature=1.0, seed=1), codec.eos_ids, grammar.constraint(), wanted)
        stats = LookupStats()
        options: dict[str, Any] = {"max_new_tokens": 120, "eos_ids": codec.eos_ids, "lookup": lookup, "stats": stats}
        ids = list(engine.generate(graph, prompt, graph.base, sampler=sampler, **options))
        assert ids[-1] in codec.eos_ids
        assert len(sampler.logprobs) == (len(ids) if wanted else 0)
        texts.append(codec.decode(ids))
        runs.append((stats.runs, len(ids)))
    assert texts[0] in [f'{{"name": "Ann of the hill", "again": "Ann of the hill", "n": {n}}}' for n in (1, 22)]
    assert texts == texts[:1] * 3
    assert all(count < length / 2 for count, length in runs), runs

"""Drafts on exported graphs: a rewind leaves nothing behind, neither in place nor in buffers that each run returns."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.drafts import Scripted, after
from runtime_tests.failures import Failure
from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import LookupStats, PrefixCache, Sampler, Sampling, engine
from tp_runtime.patch import Patch
from tp_runtime.session import BoundPatch, Graph, Lengths, ModelFolder

LEAD = [5, 6, 7]
PROMPT = [*LEAD, *token_ids(20, seed=1), *token_ids(20, seed=1)]  # the second half copies the first one
SCRIPTS = {"right": [(5, 0)], "wrong": [(0, 4)], "mixed": [(2, 1), (0, 1), (6, 0), (0, 3), (3, 2)]}
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7, seed=3)}


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-llama-optimum", "tiny-gemma"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = ModelFolder.open(private_copy(request.param, tmp_path_factory.mktemp("export")))
    return Graph(folder, "cpu", threads=1)


def patches(graph: Graph) -> dict[str, Patch | None]:
    """Return no patch, one of weights, and some with entries; if layers are windowed, with other counts for them."""
    weights = patch_for(graph.folder, seed=1, rank=3, scale=0.2)
    made: dict[str, Patch | None] = {"base": None, "weights": weights}
    counts = [5] if graph.folder.windowed is None else [5, Lengths(20, 6), Lengths(4, 13)]
    return made | {f"entries {one}": with_prefix(weights, graph.folder, LEAD, one, position=25) for one in counts}


def start(graph: Graph, bound: BoundPatch, prompt: list[int] = PROMPT, new: int = 40, **options: Any) -> Generator[int]:
    sampler = Sampler(options.pop("sampling", None))
    options = {"eos_ids": frozenset(), **options}
    return engine.generate(graph, prompt, bound, sampler=sampler, max_new_tokens=new, **options)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_ids_are_those_without_lookup(graph: Graph, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, patch in patches(graph).items():
        bound = graph.bind(patch)
        plain = list(start(graph, bound, sampling=sampling))
        assert list(start(graph, bound, sampling=sampling, lookup=8)) == plain, name
        for how, script in SCRIPTS.items():
            with monkeypatch.context() as patched:
                made = Scripted(after([*PROMPT, *plain], graph.folder.vocab_size), script, graph.folder.vocab_size)
                patched.setattr(engine, "Drafter", made)
                stats = LookupStats()
                got = list(start(graph, bound, sampling=sampling, lookup=8, stats=stats))
            assert got == plain, f"{name}, {how}"
            assert (stats.accepted > 0) == (how != "wrong") and (stats.accepted < stats.drafted) == (how != "right")


def test_a_conversation_goes_on_after_drafts_as_after_plain_steps(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers grow from 256 to 512 positions on the way, in the middle of a draft."""
    for name, patch in patches(graph).items():
        bound = graph.bind(patch)
        turns, wanted = [PROMPT, token_ids(150, seed=2), token_ids(30, seed=3)], []
        dialogue: list[int] = []
        for turn in turns:
            dialogue = [*dialogue, *turn]
            wanted.append(list(start(graph, bound, dialogue, new=24)))
            dialogue = [*dialogue, *wanted[-1]]
        cache, asked = graph.new_cache(bound), list[int]()
        for turn, answer in zip(turns, wanted, strict=True):
            asked = [*asked, *turn]
            size = graph.folder.vocab_size
            monkeypatch.setattr(engine, "Drafter", Scripted(after(dialogue, size), SCRIPTS["mixed"], size))
            assert list(start(graph, bound, asked, new=24, cache=cache, lookup=8)) == answer, name
            assert cache.tokens == [*asked, *answer][:-1]
            asked = [*asked, *answer]


def test_the_end_of_the_window_and_an_end_id_within_a_draft_end_the_completion(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, size = list(start(graph, graph.base)), graph.folder.vocab_size
    monkeypatch.setattr(engine, "Drafter", Scripted(after([*PROMPT, *plain], size), [(9, 0)], size))
    end = next(i for i in range(12, 40) if plain[i] not in plain[:i] or i == 39)
    for ends in (frozenset(), frozenset({plain[end]})):
        cache = graph.new_cache(graph.base)
        got = list(start(graph, graph.base, lookup=9, cache=cache, eos_ids=ends))
        assert got == (plain if not ends else plain[: plain.index(plain[end]) + 1])
        assert cache.tokens == [*PROMPT, *got[:-1]]
    near = replace(graph.folder, context_window=len(PROMPT) + 7)
    monkeypatch.setattr(graph, "folder", near)
    assert list(start(graph, graph.base, lookup=9)) == plain[:7]


def test_the_prefix_cache_serves_what_drafts_left_in_it(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, size = list(start(graph, graph.base)), graph.folder.vocab_size
    monkeypatch.setattr(engine, "Drafter", Scripted(after([*PROMPT, *plain], size), SCRIPTS["mixed"], size))
    for read in (3, 4, 5, 40):
        store = PrefixCache(1 << 24)
        ids = start(graph, graph.base, lookup=8, prefix_cache=store)
        got = [next(ids) for _ in range(read)]
        ids.close()
        assert got == plain[:read] and store.entries == 1
        asked = [*PROMPT, *plain[:read], 9, 8]
        stats = LookupStats()
        answer = list(start(graph, graph.base, asked, new=6, prefix_cache=store, stats=stats))
        assert store.hits == 1 and answer == list(start(graph, graph.base, asked, new=6))


def conversation(graph: Graph, bound: BoundPatch, turn: list[int], cache: Any, lookup: int = 8) -> list[int]:
    return list(start(graph, bound, turn, new=12, cache=cache, lookup=lookup))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["lines", "calls"])
def test_a_conversation_goes_on_after_a_failure_anywhere(
    graph: Graph, kind: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch, every: int = 97
) -> None:
    """An error at any line or call of a completion with drafts; the next turn runs in the same cache."""
    entries = list(patches(graph).values())[-1]
    size = graph.folder.vocab_size
    for bound in (graph.base, graph.bind(entries)):
        wanted = conversation(graph, bound, PROMPT, None, lookup=0)
        asked = [*PROMPT, *wanted[:5], 9]
        answer = conversation(graph, bound, asked, None, lookup=0)
        known = after([*PROMPT, *wanted], size)
        monkeypatch.setattr(engine, "Drafter", Scripted(known, SCRIPTS["mixed"], size))
        for at in count(0, every):
            cache, failure = graph.new_cache(bound), Failure(kind, at, error)
            try:
                failure.run(partial(conversation, graph, bound, PROMPT, cache))
                break  # there are fewer points
            except error:
                pass
            if at % 2:
                assert conversation(graph, bound, PROMPT, cache) == wanted, f"point {at}"
            assert conversation(graph, bound, asked, cache) == answer, f"point {at}"


def test_other_ids_run_in_the_same_session_between_two_ids_of_a_draft(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, size = list(start(graph, graph.base)), graph.folder.vocab_size
    other = list(start(graph, graph.base, PROMPT[:10]))
    monkeypatch.setattr(engine, "Drafter", Scripted(after([*PROMPT, *plain], size), SCRIPTS["mixed"], size))
    one = start(graph, graph.base, lookup=8)
    two = start(graph, graph.base, PROMPT[:10])
    assert list(zip(one, two, strict=True)) == list(zip(plain, other, strict=True))


def test_an_int4_graph_drafts_too(tmp_path: Path) -> None:
    """Its kernels round differently with the number of ids in a run, so only the counts are compared."""
    graph = Graph(ModelFolder.open(private_copy("tiny-llama-int4", tmp_path)), "cpu", threads=1)
    stats = LookupStats()
    ids = list(start(graph, graph.base, new=60, lookup=8, stats=stats))
    assert len(ids) == 60 and stats.accepted > 0 and stats.runs < 60

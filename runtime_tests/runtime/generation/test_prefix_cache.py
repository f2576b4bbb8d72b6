"""The prefix cache: it never changes the output, saves forward passes, separates patches, and keeps to its budget."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.fake_graph import BASE, PATCH, FakeBatchGraph, expected
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import RequestError
from tp_runtime.generation import Batch, PrefixCache, Sampler, engine
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import BoundPatch, Graph, KVCache, Lengths, ModelFolder

HALF = BoundPatch(dict, ("graph", (("p", 0.5),)))
BOUNDS = [BASE, PATCH, HALF]
LEAD = [5, 6, 7]


# -- on a fake graph: the cache finds only what was run ------------------------------------------------------


def fake_content(cache: KVCache) -> dict[str, np.ndarray]:
    """Return eight bytes per token that differ for every prompt and every patch."""
    patch_mark = hash(cache.key) % 1000
    return {"past": np.array(cache.tokens, np.int64)[None, :, None] + patch_mark * 1000}


class FakeStoreGraph(FakeBatchGraph):
    """A fake graph that checks that a cache starts only with the content of its own key and tokens."""

    def content(self, cache: KVCache) -> dict[str, np.ndarray]:
        return fake_content(cache)

    def forward(self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, **options: Any) -> np.ndarray:
        if cache.start is not None:
            assert np.array_equal(cache.start["past"], fake_content(cache)["past"])
            assert not cache.start["past"].flags.writeable
            cache.start = None
        return super().forward(tokens, cache, bound, **options)


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=12),
        st.integers(0, 2),
        st.integers(1, 4),
        st.sampled_from(["single", "stopped", "batch", "prefill"]),
    ),
    max_size=12,
)


@given(queue=requests, budget=st.integers(1, 400))
def test_the_prefix_cache_never_changes_the_output_and_keeps_to_its_budget(queue: list[Any], budget: int) -> None:
    graph, store = FakeStoreGraph(), PrefixCache(budget)
    for prompt, which, count, how in queue:
        bound, found = BOUNDS[which], store.hits + store.misses
        options: dict[str, Any] = {"sampler": Sampler(), "max_new_tokens": count, "eos_ids": frozenset()}
        if how == "batch":
            batch = Batch(graph, 2, store)
            row = batch.join(prompt, bound, **options)
            while batch.step():
                pass
            got = row.tokens[len(prompt) :]
        elif how == "prefill":
            if 8 * len(prompt) > budget:
                with pytest.raises(RequestError, match="cannot hold"):
                    engine.prefill(graph, prompt, bound, store)
            else:
                engine.prefill(graph, prompt, bound, store)
            continue
        else:
            ids = engine.generate(graph, prompt, bound, prefix_cache=store, **options)
            got = [next(ids)] if how == "stopped" else list(ids)
            count = len(got)
            ids.close()  # type: ignore[attr-defined]
        assert got == expected(prompt, count, bound)
        assert store.hits + store.misses == found + 1
        assert 0 <= store.bytes <= budget and (store.entries > 0) == (store.bytes > 0)


def keep(store: PrefixCache, tokens: Sequence[int], bound: BoundPatch = BASE) -> bool:
    cache = KVCache(bound.key)
    cache.tokens[:] = tokens
    return store.keep(cache, lambda: fake_content(cache))


def found(store: PrefixCache, tokens: Sequence[int], bound: BoundPatch = BASE) -> int:
    """Return how many of `tokens` the store has, for a prompt of `tokens` and one more id."""
    cache = KVCache(bound.key)
    store.fill(cache, [*tokens, 9])
    return len(cache)


def test_the_longest_common_prefix_is_found() -> None:
    store = PrefixCache(10_000)
    assert found(store, [1, 2, 3]) == 0
    for tokens in ([1, 2, 3, 4], [1, 2, 7, 7, 7], [8]):
        assert keep(store, tokens)
    assert [found(store, t) for t in ([1, 2, 3, 9], [1, 2, 7, 7], [1, 9], [8, 1], [9], [])] == [3, 4, 1, 1, 0, 0]
    assert (store.hits, store.misses) == (4, 3)
    # At least the last id is always left to run.
    cache = KVCache(BASE.key)
    store.fill(cache, [1, 2, 3, 4])
    assert cache.tokens == [1, 2, 3]


def test_an_entry_replaces_only_the_entries_it_extends() -> None:
    store = PrefixCache(10_000)
    keep(store, [1, 2])
    keep(store, [1, 2, 3])
    assert store.entries == 1 and store.bytes == 3 * 8
    keep(store, [1, 2])  # an entry contains this already
    keep(store, [1, 2, 4])
    keep(store, [1, 2, 3, 4], PATCH)
    assert store.entries == 3 and store.bytes == 10 * 8
    store.clear()
    assert (store.entries, store.bytes) == (0, 0) and found(store, [1, 2]) == 0


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    store = PrefixCache(6 * 8)
    for first in (1, 2, 3):
        keep(store, [first, 0])
    assert found(store, [1]) == 1  # this counts as a use
    keep(store, [2])  # so does this, because an entry contains it
    keep(store, [4, 0])
    assert [found(store, [first]) for first in (1, 2, 3, 4)] == [1, 1, 0, 1]
    assert not keep(store, [5] * 7) and store.entries == 3  # larger than the budget, so no entry is evicted
    assert keep(store, [6] * 6) and store.entries == 1 and store.bytes == 6 * 8


@pytest.mark.parametrize("budget", [-1, True, 1.5, "1", None])
def test_an_invalid_budget_is_refused(tiny_llama_export: Path, budget: Any) -> None:
    for make in (PrefixCache, lambda b: PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=b)):
        with pytest.raises(RequestError) as error:
            make(budget)
        assert error.value.field == "prefix_cache_bytes"


# -- on graphs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma"])
def graph(request: pytest.FixtureRequest) -> Graph:
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


def logits_of(graph: Graph, ids: list[int], bound: BoundPatch, store: PrefixCache | None) -> tuple[np.ndarray, int]:
    """Return the last logits, and the number of ids that were run for them."""
    cache = graph.new_cache(bound)
    if store is not None:
        store.fill(cache, ids)
    run = ids[len(cache) :]
    logits = graph.forward(run, cache, bound)
    if store is not None:
        assert store.keep(cache, lambda: graph.content(cache))
    return logits, len(run)


def test_logits_match_those_without_the_prefix_cache_and_fewer_tokens_are_run(graph: Graph) -> None:
    patch = patch_for(graph.folder, seed=1, scale=0.2)
    bounds = [None, patch, 0.5 * patch, with_prefix(patch, graph.folder, LEAD)]
    store = PrefixCache(1 << 30)
    for bound in map(graph.bind, bounds):  # no patch finds the entries of another
        shared = [*LEAD, *token_ids(40, seed=1)]
        one, two = [*shared, *token_ids(9, seed=2)], [*shared, *token_ids(5, seed=3)]
        lead = len(graph.new_cache(bound))
        for ids, run in ((one, len(one) - lead), (two, 5), (one, 1), (shared, 1), ([*one, 4, 4], 2)):
            got, count = logits_of(graph, ids, bound, store)
            assert count == run
            assert furthest(got, logits_of(graph, ids, bound, None)[0]) < 1e-5
    kv, layers = graph.folder.kv, graph.folder.layers
    position = 2 * layers * kv.heads * kv.head_dim * 4
    each = 2 * len(shared) + 9 + 2 + 5
    assert store.entries == 8 and store.bytes == (4 * each + 2 * (5 - len(LEAD))) * position


@pytest.mark.parametrize("entries", [Lengths(20, 6), Lengths(4, 13)], ids=["fewer windowed", "more windowed"])
def test_an_entry_keeps_the_lengths_of_each_kind_of_layer(tiny_gemma_export: Path, entries: Lengths) -> None:
    graph, store = Graph(ModelFolder.open(tiny_gemma_export), "cpu"), PrefixCache(1 << 30)
    bound = graph.bind(with_prefix(patch_for(graph.folder, seed=1, scale=0.2), graph.folder, LEAD, entries, 25))
    shared = [*LEAD, *token_ids(40, seed=1)]
    one, two = [*shared, *token_ids(9, seed=2)], [*shared, *token_ids(5, seed=3)]
    for ids, run in ((one, len(one) - len(LEAD)), (two, 5), (one, 1), (shared, 1), ([*one, 4, 4], 2)):
        got, count = logits_of(graph, ids, bound, store)
        assert count == run
        assert furthest(got, logits_of(graph, ids, bound, None)[0]) < 1e-5
    # A row of a batch starts from an entry, and its keys and values are stored at its end.
    batch, hits = Batch(graph, 2, store), store.hits
    row = batch.join(two, bound, sampler=Sampler(), max_new_tokens=6, eos_ids=frozenset())
    while batch.step():
        pass
    alone = engine.generate(graph, two, bound, sampler=Sampler(), max_new_tokens=6, eos_ids=frozenset())
    assert row.tokens == [*two, *alone] and store.hits == hits + 1
    assert logits_of(graph, row.tokens, bound, store)[1] == 1


def test_requests_do_not_share_buffers(graph: Graph) -> None:
    store = PrefixCache(1 << 30)
    ids = token_ids(30, seed=4)
    wanted, _run = logits_of(graph, ids, graph.base, store)
    caches = [graph.new_cache(graph.base) for _ in range(2)]
    for cache in caches:
        store.fill(cache, ids)
    graph.forward(token_ids(20, seed=5), caches[0], graph.base)
    assert furthest(graph.forward(ids[-1:], caches[1], graph.base), wanted) < 1e-5
    assert furthest(logits_of(graph, ids, graph.base, store)[0], wanted) < 1e-5


def test_rows_of_a_batch_use_and_fill_the_prefix_cache(graph: Graph) -> None:
    store = PrefixCache(1 << 30)
    bounds = [graph.base, graph.bind(patch_for(graph.folder, seed=2, scale=0.2))]
    prompts = [[*token_ids(20, seed=6), *token_ids(n, seed=n)] for n in (1, 4, 7)]

    def batched(store: PrefixCache | None) -> list[list[int]]:
        batch = Batch(graph, 4, store)
        rows = [
            batch.join(prompt, bounds[number % 2], sampler=Sampler(), max_new_tokens=5 + number, eos_ids=frozenset())
            for number, prompt in enumerate(prompts)
        ]
        while batch.step():
            pass
        return [row.tokens for row in rows]

    wanted = batched(None)
    assert batched(store) == wanted and (store.hits, store.misses) == (1, 2)
    assert batched(store) == wanted and (store.hits, store.misses) == (4, 2)
    # A conversation that continues can use the entry of a finished row.
    ids = [*wanted[2], 3]
    got, run = logits_of(graph, ids, bounds[0], store)
    assert run == 2 and furthest(got, logits_of(graph, ids, bounds[0], None)[0]) < 1e-5


# -- on a model ----------------------------------------------------------------------------------------------

SYSTEM = "You are a pirate, and you answer every question with one about the sea."


@pytest.fixture(scope="module")
def plain(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu")


@pytest.fixture
def model(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=1 << 26)


def store_of(model: PatchedModel) -> PrefixCache:
    assert model.prefix_cache is not None
    return model.prefix_cache


def test_a_model_generates_the_same_texts_with_and_without_a_prefix_cache(
    model: PatchedModel, plain: PatchedModel
) -> None:
    patch = patch_for(model.graph.folder, seed=3, scale=0.5)
    options = [
        {"prompt": prompt, "patch": choice, "system": system, "max_new_tokens": 6}
        for _ in range(2)
        for system in (SYSTEM, None)
        for choice in (None, patch, 0.5 * patch)
        for prompt in ("Hi", "How far is the moon?")
    ]
    wanted = [plain.generate(**one) for one in options]  # type: ignore[arg-type]
    assert [model.generate(**one) for one in options] == wanted  # type: ignore[arg-type]
    assert store_of(model).misses == 3 and store_of(model).hits == 21  # one miss for each patch
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda one: model.generate(**one), options)) == wanted


def test_a_system_prompt_can_be_prefilled_ahead_of_time(
    model: PatchedModel, plain: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = patch_for(model.graph.folder, seed=4, scale=0.5)
    model.load_patch(patch, "p")
    model.prefill([{"role": "system", "content": SYSTEM}], patch="p")
    forward, ran = model.graph.forward, []
    monkeypatch.setattr(model.graph, "forward", lambda t, *a, **k: ran.append(len(t)) or forward(t, *a, **k))
    text = model.generate("Hi", system=SYSTEM, patch="p", max_new_tokens=3)
    assert text == plain.generate("Hi", system=SYSTEM, patch=patch, max_new_tokens=3)
    assert ran[0] < 50 < len(model.codec.render("Hi", SYSTEM)) and store_of(model).hits == 1
    model.unload_patch("p")
    # A request with its own cache does not use the prefix cache.
    before = store_of(model).hits, store_of(model).misses, store_of(model).entries
    model.generate("Hi", system=SYSTEM, cache=model.new_cache(), max_new_tokens=3)
    assert before == (store_of(model).hits, store_of(model).misses, store_of(model).entries)


def test_a_prefill_that_cannot_be_stored_is_refused(plain: PatchedModel, tiny_llama_export: Path) -> None:
    assert plain.prefix_cache is None
    with pytest.raises(RequestError, match="the model was opened without a prefix cache"):
        plain.prefill("Hi")
    small = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=1000)
    with pytest.raises(RequestError, match="cannot hold this prompt"):
        small.prefill("Hi")
    assert store_of(small).entries == 0
    assert small.generate("Hi", max_new_tokens=3) == plain.generate("Hi", max_new_tokens=3)
    with pytest.raises(RequestError, match="context window"):
        small.prefill("x" * 600)


def test_strength_zero_and_a_default_patch_share_entries_with_their_equals(tiny_llama_export: Path) -> None:
    """Strength 0 shares the entries of the base. A default patch shares entries with the same patch, bound."""
    patch: Patch = patch_for(ModelFolder.open(tiny_llama_export), seed=5)
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=patch, prefix_cache_bytes=1 << 26)
    for choice, strength in ((None, 1.0), (patch, 0.0)):
        model.generate("Hi", patch=choice, strength=strength, max_new_tokens=2)
    model.generate("Hi", max_new_tokens=2)
    model.generate("Hi", patch=patch, max_new_tokens=2)
    assert (store_of(model).hits, store_of(model).misses) == (2, 2)

"""The prefix cache between threads, and under a garbage collector that ends a dropped completion at any line."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.fake_graph import BASE, PATCH, expected
from runtime_tests.interrupts import interrupted_at_every_step
from runtime_tests.runtime.generation.test_prefix_cache import FakeStoreGraph, fake_content, found, keep
from tp_runtime.generation import PrefixCache, Sampler, engine
from tp_runtime.generation.prefix_entry import PrefixEntry
from tp_runtime.model import PatchedModel
from tp_runtime.session import BoundPatch, KVCache

BYTES = 8  # of a token of the fake content


def generated(graph: FakeStoreGraph, store: PrefixCache, prompt: Sequence[int], bound: BoundPatch) -> list[int]:
    options: dict[str, Any] = {"sampler": Sampler(), "max_new_tokens": 3, "eos_ids": frozenset()}
    return list(engine.generate(graph, prompt, bound, prefix_cache=store, **options))


def test_threads_that_share_a_prefix_cache_get_their_own_answers() -> None:
    """The fake graph checks that each cache starts with the content of its own key and ids."""
    store, meet = PrefixCache(20 * BYTES), threading.Barrier(4)

    def work(seed: int) -> bool:
        graph, random = FakeStoreGraph(), np.random.default_rng(seed)
        meet.wait(30)
        for _ in range(150):
            prompt = random.integers(0, 3, random.integers(1, 9)).tolist()
            bound = (BASE, PATCH)[int(random.integers(2))]
            if generated(graph, store, prompt, bound) != expected(prompt, 3, bound) or store.bytes > store.budget:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert store.hits + store.misses == 4 * 150 and store.hits > 0


def test_requests_of_many_threads_on_one_model_with_a_prefix_cache_give_the_usual_answers(
    tiny_llama_export: Path,
) -> None:
    plain = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=200_000)
    prompts = ["Where is the cat?", "Where is the dog?", "Where", "How far is the moon?"]
    wanted = [plain.generate(prompt, max_new_tokens=6) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda prompt: model.generate(prompt, max_new_tokens=6), prompts * 6))
    assert got == wanted * 6
    assert model.prefix_cache is not None and model.prefix_cache.bytes <= 200_000


@pytest.mark.parametrize("place", ["common", "nbytes"])
def test_an_entry_that_the_garbage_collector_stores_meanwhile_confuses_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may end a dropped completion inside any call, and that one stores its keys and values."""
    store = PrefixCache(12 * BYTES)
    original, left = getattr(PrefixEntry, place), [3]

    def collect(self: PrefixEntry, *args: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            assert keep(store, [7, 7, left[0]])  # this drops older entries, whose places the outer call knows
        return original(self, *args) if place == "common" else original.fget(self)

    for tokens in ([1, 2, 3], [4, 5], [6, 6]):
        assert keep(store, tokens)
    monkeypatch.setattr(PrefixEntry, place, collect if place == "common" else property(collect))
    cache = KVCache(BASE.key)
    store.fill(cache, [4, 5, 6])
    if cache.tokens:
        assert cache.start is not None and np.array_equal(cache.start["past"], fake_content(cache)["past"])
    left[0] = 3
    assert keep(store, [9, 9, 9, 9])
    monkeypatch.undo()
    assert store.bytes <= store.budget and found(store, [9, 9, 9, 9]) == 4


def test_an_interrupt_at_any_line_of_a_fill_leaves_no_token_without_its_content() -> None:
    store = PrefixCache(1000)
    keep(store, [1, 2, 3, 4])
    caches, begun = [KVCache(BASE.key)], 0

    def fill() -> None:
        caches.append(KVCache(BASE.key))
        store.fill(caches[-1], [1, 2, 3, 4, 5])

    for place in interrupted_at_every_step(fill, ("generation/prefix_cache.py", "session/kv_cache.py")):
        cache = caches[-1]
        if cache.tokens:
            begun += 1
            assert cache.start is not None and np.array_equal(cache.start["past"], fake_content(cache)["past"]), place
        assert found(store, [1, 2, 3, 4]) == 4  # the lock is free and the entry is there
    assert begun

"""Loaded patches stay as their files store them, and the converted ones that ran last are kept, up to a limit."""

from __future__ import annotations

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from runtime_tests.committed import private_copy
from runtime_tests.interrupts import interrupted_at_every_step
from runtime_tests.logits import furthest, graph_logits
from runtime_tests.patches import patch_for
from tp_runtime import PatchedModel
from tp_runtime.errors import RequestError
from tp_runtime.generation import Batch, Sampler
from tp_runtime.patch import Patch
from tp_runtime.session import BoundValuesStore, Graph, ModelFolder
from tp_runtime.session.bound_values import BoundValues

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def values(nbytes: int = 10) -> BoundValues:
    return BoundValues({"a": object()}, nbytes)


def key(name: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    return "graph", ((name, 1.0),)


def fail() -> BoundValues:
    raise AssertionError("the values were converted again")


# -- the store -----------------------------------------------------------------------------------------------


def test_the_values_that_were_used_last_are_kept_up_to_the_limit() -> None:
    store = BoundValuesStore(25)
    for name in ("p", "q"):
        store.get(key(name), values)
    store.get(key("p"), fail)
    store.get(key("r"), values)  # q was used before p
    assert store.nbytes == 20
    store.get(key("p"), fail)
    store.get(key("r"), fail)
    made = values()
    assert store.get(key("q"), lambda: made) is made
    assert (store.hits, store.misses) == (3, 4)


@pytest.mark.parametrize("limit", [0, 5])
def test_values_that_somebody_refers_to_are_not_converted_again(limit: int) -> None:
    store = BoundValuesStore(limit)
    held = store.get(key("p"), values)
    assert store.nbytes == 0 and store.get(key("p"), fail) is held
    del held
    gc.collect()
    assert store.get(key("p"), values) and store.misses == 2


def test_dropped_values_stay_with_whoever_refers_to_them() -> None:
    store = BoundValuesStore(100)
    held = store.get(key("p"), values)
    store.drop(key("p"))
    store.drop(key("never there"))
    assert store.nbytes == 0 and store.get(key("p"), fail) is held and store.nbytes == 10


def test_threads_that_convert_one_patch_at_the_same_time_get_the_same_values() -> None:
    store, meet = BoundValuesStore(100), threading.Barrier(4)

    def convert() -> BoundValues:
        meet.wait(30)
        return values()

    with ThreadPoolExecutor(4) as pool:
        found = [running.result() for running in [pool.submit(store.get, key("p"), convert) for _ in range(4)]]
    assert len({id(one) for one in found}) == 1 and store.nbytes == 10


def test_a_conversion_that_fails_leaves_nothing_behind() -> None:
    store = BoundValuesStore(100)
    with pytest.raises(AssertionError, match="converted"):
        store.get(key("p"), fail)
    assert store.nbytes == 0 and store.get(key("p"), values)


def test_an_interrupt_at_any_line_leaves_a_store_that_counts_right() -> None:
    sizes, stores = {"p": 10, "q": 10, "r": 10, "large": 40}, [BoundValuesStore(25)]

    def use() -> None:
        stores.append(BoundValuesStore(25))
        for name, size in sizes.items():
            stores[-1].get(key(name), partial(values, size))

    for _at in interrupted_at_every_step(use, ("session/bound_values.py",)):
        for name in ("large", "p", "q"):
            stores[-1].get(key(name), partial(values, sizes[name]))
        assert stores[-1].nbytes == 20


# -- a graph that keeps no converted patch ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_llama_export: Path) -> ModelFolder:
    return ModelFolder.open(tiny_llama_export)


@pytest.fixture(scope="module")
def small(folder: ModelFolder) -> Graph:
    return Graph(folder, "cpu", threads=1, bound_patch_bytes=0)


def halved(folder: ModelFolder, seed: int, dtype: str = "f16") -> Patch:
    return patch_for(folder, seed=seed, rank=3, scale=0.3).rounded(dtype)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "i8", "f32"])
def test_a_patch_runs_the_same_whatever_its_file_stores_and_whatever_is_kept(
    small: Graph, folder: ModelFolder, dtype: str, tmp_path: Path
) -> None:
    patch = halved(folder, 1, dtype)
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.identity == patch.identity
    assert loaded.memory_bytes < loaded.nbytes  # the file also has a header
    single = Patch({slot: type(delta)(**delta.parts()) for slot, delta in patch.deltas.items()}, patch.config)
    large = Graph(folder, "cpu", threads=1)
    for expression in (lambda p: p, lambda p: -0.5 * p, lambda p: p + 2.0 * patch_for(folder, seed=2)):
        wanted = graph_logits(large, IDS, large.bind(expression(single)), (4, 1, 1, 2))
        assert np.array_equal(graph_logits(small, IDS, small.bind(expression(loaded)), (4, 1, 1, 2)), wanted)
    assert small.bound_values.nbytes == 0


def test_a_request_that_runs_keeps_the_tensors_of_a_patch_that_was_released(small: Graph, folder: ModelFolder) -> None:
    bound, others = small.bind(halved(folder, 3)), [small.bind(halved(folder, seed)) for seed in range(4, 9)]
    wanted = graph_logits(small, IDS, bound, (4, 1, 1, 2))
    cache, got = small.new_cache(bound), []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 8)):
        got.append(small.forward(IDS[start:end], cache, bound, all_logits=True))
        small.release(bound)
        for other in others:  # these would take freed memory
            small.run(IDS, other)
        gc.collect()
    assert np.array_equal(np.concatenate(got), wanted)


@pytest.mark.parametrize("route", ["tiny-llama", "tiny-llama-optimum"])
def test_a_cache_that_is_computed_again_holds_what_its_binding_needs(route: str, tmp_path: Path) -> None:
    graph = Graph(ModelFolder.open(private_copy(route, tmp_path)), "cpu", threads=1, bound_patch_bytes=0)
    bound = graph.bind(halved(graph.folder, 11))
    cache = graph.new_cache(bound)
    cache.begin_with({}, sys.maxsize, IDS[:4])  # as an interrupt leaves a cache that took its beginning from another
    assert not cache.reaches and cache.values is None
    graph._run_again(cache, bound)
    gc.collect()
    assert cache.values is not None and cache.values is bound.values
    assert route == "tiny-llama" or cache.made_by is cache.binding  # so the next run takes another binding
    assert furthest(graph.forward(IDS[4:], cache, bound, all_logits=True), graph.run(IDS, bound)[4:]) < 1e-5


def test_a_second_cache_takes_the_tensors_of_a_first_one_that_runs(small: Graph, folder: ModelFolder) -> None:
    bound = small.bind(halved(folder, 10))
    first, second = (small.new_cache(bound) for _ in range(2))
    small.forward(IDS, first, bound)
    before = small.bound_values.misses
    small.forward(IDS, second, bound)
    assert small.bound_values.misses == before and first.values is second.values


def test_rows_under_more_patches_than_are_kept_get_their_own_texts(small: Graph, folder: ModelFolder) -> None:
    bounds = [small.bind(halved(folder, 20 + seed)) for seed in range(64)]
    batch, rows = Batch(small, 64), []
    for number, bound in enumerate(bounds):
        options = {"sampler": Sampler(), "max_new_tokens": 5, "eos_ids": frozenset[int]()}
        rows.append(batch.join(IDS[: 3 + number % 4], bound, **options))  # type: ignore[arg-type]
    while batch.step():
        pass
    for row, bound in zip(rows, bounds, strict=True):
        prompt = row.tokens[: len(row.tokens) - 5]
        logits = small.run(row.tokens[:-1], bound)[len(prompt) - 1 :]
        picked = logits[np.arange(5), row.tokens[-5:]]
        assert (logits.max(1) - picked).max() < 1e-4


def test_a_sum_holds_no_values_of_its_own(folder: ModelFolder) -> None:
    one, two = halved(folder, 1), halved(folder, 2)
    total = one + 0.5 * two
    assert total.memory_bytes < one.memory_bytes + two.memory_bytes  # a sum has no means
    for slot, delta in total.deltas.items():
        a = np.concatenate([one.deltas[slot].a, two.deltas[slot].a], 1)
        assert np.array_equal(delta.a, a)


# -- a model ---------------------------------------------------------------------------------------------------


def test_unloading_and_replacing_a_patch_let_its_converted_tensors_go(
    tiny_llama_export: Path, folder: ModelFolder
) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)
    store = model.graph.bound_values
    model.load_patch(halved(folder, 1), "p")
    one = store.nbytes
    assert one > 0
    model.load_patch(halved(folder, 2), "q")
    assert store.nbytes == 2 * one
    model.load_patch(halved(folder, 3), "q", replace=True)
    assert store.nbytes == 2 * one
    wanted = model.logits(IDS, "q")
    model.load_patch(halved(folder, 3), "q", replace=True)  # the same values
    assert store.nbytes == 2 * one and furthest(model.logits(IDS, "q"), wanted) == 0
    model.unload_patch("p")
    model.unload_patch("q")
    assert store.nbytes == 0


def test_patches_that_requests_passed_are_given_up(tiny_llama_export: Path, folder: ModelFolder) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)
    for seed in range(12):
        model.logits(IDS, halved(folder, seed, "f32"))  # the slots take its tensors as they are, which needs no bytes
    assert model.graph.bound_values.nbytes == 0 and len(model.graph.bound_values._kept) == 8


def test_a_patch_in_the_slots_own_dtype_is_not_converted(folder: ModelFolder, tmp_path: Path) -> None:
    graph = Graph(folder, "cpu", threads=1)
    patch_for(folder, seed=1).save(tmp_path / "p.safetensors", "f32")
    graph.bind(Patch.load(tmp_path / "p.safetensors"))
    assert graph.bound_values.nbytes == 0


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(folder: ModelFolder, value: object) -> None:
    with pytest.raises(RequestError, match="bound_patch_bytes"):
        Graph(folder, "cpu", bound_patch_bytes=value)  # type: ignore[arg-type]

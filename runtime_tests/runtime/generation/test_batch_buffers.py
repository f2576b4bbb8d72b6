"""The buffers of a batch: they grow with its rows, and shrink after the rows that needed them have left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import Batch, Row, Sampler, Sampling, generate
from tp_runtime.session import BoundPatch, Graph, Lengths, ModelFolder

GREEDY = Sampling()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(ModelFolder.open(private_copy("tiny-llama", tmp_path_factory.mktemp("export"))), "cpu", threads=1)


@pytest.fixture(scope="module")
def bounds(graph: Graph) -> dict[int, BoundPatch]:
    """Patches by rank; two of them have rank 3."""
    ranks = {0: 0, 3: 3, 20: 20, -3: 3}
    return {key: graph.bind(patch_for(graph.folder, seed=50 + key, rank=rank)) for key, rank in ranks.items()}


def join(batch: Batch, prompt: list[int], bound: BoundPatch, new_tokens: int = 40) -> Row:
    return batch.join(prompt, bound, sampler=Sampler(GREEDY), max_new_tokens=new_tokens, eos_ids=frozenset())


def ranks(batch: Batch) -> set[int]:
    return {a.shape[2] for a, _b, _bias in rows_of(batch)._slots._arrays.values()}


def rows_of(batch: Batch) -> Any:
    return batch._rows


def assert_matches(graph: Graph, row: Row) -> None:
    wanted = generate(
        graph,
        row.tokens[: row.prompt_tokens],
        row.bound,
        sampler=Sampler(GREEDY),
        max_new_tokens=40,
        eos_ids=frozenset(),
    )
    assert row.tokens[row.prompt_tokens :] == list(wanted)[: len(row.tokens) - row.prompt_tokens]


def test_the_stacks_shrink_when_the_row_of_the_highest_rank_leaves(graph: Graph, bounds: dict[int, BoundPatch]) -> None:
    batch = Batch(graph, 3)
    rows = [join(batch, [9, key % 7], bounds[key]) for key in (3, -3, 20)]
    for number in range(3):
        batch.step()
        assert ranks(batch) == {20}
        batch.leave(rows[-1])
        batch.step()
        assert ranks(batch) == {3}
        rows.append(join(batch, [8, number], bounds[20]))
    batch.step()
    batch.leave(rows[0])
    batch.leave(rows[-1])
    rows.append(join(batch, [8], bounds[0]))
    while batch.step():
        pass
    for row in rows:
        assert_matches(graph, row)


def test_a_stack_that_the_remaining_rows_do_not_need_is_given_up(graph: Graph, bounds: dict[int, BoundPatch]) -> None:
    """Rows under one patch share its own tensors, so nothing would read the stack, however high its rank."""
    batch = Batch(graph, 3)
    low, high = join(batch, [9, 1], bounds[3]), join(batch, [9, 2], bounds[20])
    batch.step()
    assert ranks(batch) == {20}
    batch.leave(high)
    batch.step()
    assert ranks(batch) == set()
    again = join(batch, [9, 2], bounds[-3])
    batch.step()
    assert ranks(batch) == {3}
    for row in (low, again):
        assert_matches(graph, row)


def test_a_rank_that_returns_to_its_place_is_written_again(graph: Graph, bounds: dict[int, BoundPatch]) -> None:
    """The stack was narrower in between, so what it held in that row is gone."""
    batch = Batch(graph, 3)
    rows = [join(batch, [9, key % 7], bounds[key]) for key in (3, -3, 20)]
    batch.step()
    batch.leave(rows[2])
    batch.step()
    rows.append(join(batch, [9, 6], bounds[20]))
    while batch.step():
        pass
    for row in rows:
        assert_matches(graph, row)


def test_the_key_value_buffers_shrink_after_a_long_row_has_left(graph: Graph, bounds: dict[int, BoundPatch]) -> None:
    window = graph.folder.context_window
    assert window > 256, "the first buffers of the tiny model are shorter than its window"
    batch = Batch(graph, 3)
    short = join(batch, [9, 8, 7], bounds[3])
    long = join(batch, token_ids(300, seed=1), bounds[20])
    batch.step()
    grown = rows_of(batch)._kv.capacities
    assert grown.full > 256
    kv = rows_of(batch)._kv
    batch.leave(long)
    batch.step()
    assert kv.capacities == grown, "half of the buffers is not worth a copy"
    kv.fit(grown, 1)
    kv._arrays = {past: wide(array, 1024) for past, array in kv._arrays.items()}
    rows_of(batch)._binding = None
    later = join(batch, [9, 3], bounds[0])
    batch.step()
    assert kv.capacities == (256, 256)
    while batch.step():
        pass
    for row in (short, long, later):
        assert_matches(graph, row)


def test_the_buffers_of_windowed_layers_have_a_capacity_of_their_own(tiny_gemma_export: Path) -> None:
    graph = Graph(ModelFolder.open(tiny_gemma_export), "cpu", threads=1)
    lead, base = [5, 6, 7], patch_for(graph.folder, seed=1, rank=3)
    few = graph.bind(with_prefix(base, graph.folder, lead, Lengths(300, 6), 300))
    many = graph.bind(with_prefix(base, graph.folder, lead, Lengths(240, 100), 300))
    batch = Batch(graph, 3)
    first = join(batch, [*lead, 9], few)
    batch.step()
    kv = rows_of(batch)._kv
    assert kv.capacities == (512, 256)
    assert [kv._arrays[f"past_key_values.{layer}.key"].shape[2] for layer in range(3)] == [256, 512, 256]
    # A row whose text outgrows the windowed layers enlarges only these, and the rows beside it keep their contents.
    full = kv._arrays["past_key_values.1.key"]
    second = join(batch, [*lead, *token_ids(170, seed=1)], many)
    while second not in batch.rows:
        batch.step()
    assert kv.capacities == (512, 512) and kv._arrays["past_key_values.1.key"] is full
    third = join(batch, token_ids(30, seed=2), graph.base)
    while batch.step():
        pass
    for row in (first, second, third):
        assert_matches(graph, row)


def wide(array: Any, capacity: int) -> Any:
    """Return buffers [rows, heads, capacity, head dim] that begin with `array`."""
    made = array.repeat(-(-capacity // array.shape[2]), axis=2)[:, :, :capacity].copy()
    made[:, :, : array.shape[2]] = array
    return made


def test_a_batch_without_rows_keeps_no_long_buffers(graph: Graph, bounds: dict[int, BoundPatch]) -> None:
    batch = Batch(graph, 2)
    batch.leave(join(batch, token_ids(300, seed=1), bounds[3]))
    first = join(batch, token_ids(300, seed=2), bounds[3], 2)
    while batch.step():
        pass
    kv = rows_of(batch)._kv
    kv._arrays = {past: wide(array, 1024) for past, array in kv._arrays.items()}
    second = join(batch, [5], bounds[20], 3)
    while batch.step():
        pass
    assert kv.capacities == (256, 256)
    for row in (first, second):
        assert_matches(graph, row)

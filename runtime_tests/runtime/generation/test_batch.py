"""A running batch on a fake graph: every row generates what it would as a single sequence, whatever other rows do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.fake_graph import BASE, PATCH, VOCAB, FakeBatchGraph, FakeGraph, expected
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.generation import Batch, Sampler, Sampling, engine

from .batches import completion, join

schedules = st.lists(
    st.tuples(
        st.sampled_from(["join", "step", "step", "leave"]),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        st.booleans(),
        st.integers(1, 6),
    ),
    max_size=30,
)


@given(schedule=schedules, chunk=st.integers(1, 4))
def test_rows_that_join_and_leave_in_any_order_match_single_sequences(schedule: list[Any], chunk: int) -> None:
    graph = FakeBatchGraph(32)
    batch, rows = Batch(graph, 3, prefill_tokens=chunk), []
    for action, prompt, patched, limit in schedule:
        present = (*batch.rows, *batch.joining)
        if action == "join" and batch.free:
            rows.append((join(batch, prompt, PATCH if patched else BASE, limit), prompt, limit))
        elif action == "leave" and present:
            batch.leave(present[limit % len(present)])
        else:
            before, decoding, runs = {row: list(row.tokens) for row in present}, set(batch.rows), len(graph.runs)
            stepped = dict(batch.step())
            assert decoding <= set(stepped) <= set(before)
            assert all(row.tokens == [*before[row], token] for row, token in stepped.items())
            if decoding:  # a decoding row waits for at most one chunk of the joining rows' prompts
                assert sum(map(len, graph.runs[runs:])) <= len(stepped) + chunk
            else:
                assert set(stepped) == set(before)
    while batch.step():
        pass
    for row, prompt, limit in rows:
        whole = expected(prompt, limit, row.bound)
        assert row.finish_reason in ("length", "left")
        assert completion(row) == (whole if row.finish_reason == "length" else whole[: len(completion(row))])


def test_a_row_ends_at_an_eos_id_a_limit_or_the_window() -> None:
    whole = expected([3, 1, 4], 8)
    batch = Batch(FakeBatchGraph(8), 3)
    eos, limit, window = join(batch, [3, 1, 4], eos=[whole[2]]), join(batch, [3, 1, 4], n=2), join(batch, [3, 1, 4])
    while batch.step():
        pass
    assert (eos.finish_reason, completion(eos)) == ("eos", whole[: whole.index(whole[2]) + 1])
    assert (limit.finish_reason, completion(limit)) == ("length", whole[:2])
    assert (window.finish_reason, completion(window)) == ("length", whole[:5])
    assert batch.rows == () and batch.free == 3 and batch.step() == []
    batch.leave(eos)  # this row has already ended
    assert eos.finish_reason == "eos"


def test_draws_do_not_depend_on_the_other_rows() -> None:
    def single(seed: int, **options: Any) -> list[int]:
        sampling = Sampling(**{"temperature": 3.0, "seed": seed, **options})
        ids = engine.generate(
            FakeGraph(), [3, 1, 4], BASE, sampler=Sampler(sampling), max_new_tokens=8, eos_ids=frozenset()
        )
        return list(ids)

    batch = Batch(FakeBatchGraph(), 8)
    first = join(batch, [3, 1, 4], temperature=3.0, seed=1)
    batch.step()
    others = [join(batch, [3, 1, 4], temperature=3.0, seed=seed) for seed in (1, 2)]
    greedy = join(batch, [3, 1, 4])
    penalised = join(batch, [3, 1, 4], repetition_penalty=2.0)
    while batch.step():
        pass
    assert completion(first) == completion(others[0]) == single(1) != completion(others[1]) == single(2)
    assert completion(greedy) == expected([3, 1, 4], 8)
    assert completion(penalised) == single(0, temperature=0.0, repetition_penalty=2.0)


def test_bad_requests_are_refused_before_anything_runs_and_do_not_change_the_batch() -> None:
    graph = FakeBatchGraph(16)
    batch = Batch(graph, 2)
    row = join(batch, [3, 1, 4])
    runs = len(graph.runs)
    for prompt, limit, field in (([], 8, "prompt"), ([1] * 16, 8, "prompt"), ([1], 0, "max_new_tokens")):
        with pytest.raises(RequestError) as error:
            join(batch, prompt, n=limit)
        assert error.value.field == field
    with pytest.raises(RequestError, match="not an id"):
        join(batch, [1, 2, VOCAB])
    join(batch, [2])
    with pytest.raises(RequestError, match="the batch is full"):
        join(batch, [2])
    assert len(graph.runs) == runs and row in batch.joining
    while batch.step():
        pass
    assert completion(row) == expected([3, 1, 4], 8)
    for rows in (0, -1, True, 1.5, "2"):
        with pytest.raises(RequestError, match=r"^rows: the value is not a positive integer"):
            Batch(graph, rows)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"^prefill_tokens: the value is not a positive integer"):
            Batch(graph, 1, prefill_tokens=rows)  # type: ignore[arg-type]


def test_only_the_row_without_finite_logits_leaves_the_batch() -> None:
    graph = FakeBatchGraph()
    batch = Batch(graph, 3)
    rows = [join(batch, [3, last]) for last in range(3)]
    step = batch._rows.step
    batch._rows.step = lambda rows: step(rows) * [[1], [np.nan], [1]]  # type: ignore[method-assign]
    assert [row for row, _token in batch.step()] == [rows[0], rows[2]]
    assert rows[1].finish_reason == "error" and isinstance(rows[1].error, ModelFormatError)
    batch._rows.step = step  # type: ignore[method-assign]
    while batch.step():
        pass
    assert completion(rows[0]) == expected([3, 0], 8) and completion(rows[2]) == expected([3, 2], 8)

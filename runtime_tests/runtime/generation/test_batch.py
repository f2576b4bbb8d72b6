"""A running batch on token ids: every row is what it is alone, whatever joins, leaves or runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.committed import private_copy
from runtime_tests.fake_graph import BASE, PATCH, VOCAB, FakeBatchGraph, FakeGraph, expected
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import ModelFormatError, PatchShapeError, RequestError, StaleCacheError
from tp_runtime.generation import Batch, Row, Sampling, engine
from tp_runtime.generation.row_kv import StackedKV
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import BoundPatch, Graph, ModelFolder

LEAD = [5, 6, 7]  # the ids that the KV prefixes stand in for
GREEDY = Sampling()


# -- on a fake graph: the loop -------------------------------------------------------------------------------


def join(batch: Batch, prompt: Sequence[int], bound: BoundPatch = BASE, n: Any = 8, **options: Any) -> Row:
    eos = frozenset(options.pop("eos", ()))
    return batch.join(prompt, bound, sampling=Sampling(**options), max_new_tokens=n, eos_ids=eos)


def completion(row: Row) -> list[int]:
    return row.tokens[row.prompt_tokens :]


schedules = st.lists(
    st.tuples(
        st.sampled_from(["join", "step", "step", "leave"]),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        st.booleans(),
        st.integers(1, 6),
    ),
    max_size=30,
)


@given(schedule=schedules, piece=st.integers(1, 4))
def test_rows_joining_and_leaving_in_any_order_say_what_they_say_alone(schedule: list[Any], piece: int) -> None:
    graph = FakeBatchGraph(32)
    batch, rows = Batch(graph, 3, prefill_tokens=piece), []
    for what, prompt, patched, limit in schedule:
        there = (*batch.rows, *batch.joining)
        if what == "join" and batch.free:
            rows.append((join(batch, prompt, PATCH if patched else BASE, limit), prompt, limit))
        elif what == "leave" and there:
            batch.leave(there[limit % len(there)])
        else:
            before, waiting, runs = {row: list(row.tokens) for row in there}, set(batch.rows), len(graph.runs)
            handed = dict(batch.step())
            assert waiting <= set(handed) <= set(before)
            assert all(row.tokens == [*before[row], token] for row, token in handed.items())
            if waiting:  # nobody waits for more than a piece of the others' prompts
                assert sum(map(len, graph.runs[runs:])) <= len(handed) + piece
            else:
                assert set(handed) == set(before)
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
    batch.leave(eos)  # has ended already
    assert eos.finish_reason == "eos"


def test_draws_do_not_depend_on_what_else_is_in_the_batch() -> None:
    def alone(seed: int, **options: Any) -> list[int]:
        sampling = Sampling(**{"temperature": 3.0, "seed": seed, **options})
        ids = engine.generate(FakeGraph(), [3, 1, 4], BASE, sampling=sampling, max_new_tokens=8, eos_ids=frozenset())
        return list(ids)

    batch = Batch(FakeBatchGraph(), 8)
    first = join(batch, [3, 1, 4], temperature=3.0, seed=1)
    batch.step()
    others = [join(batch, [3, 1, 4], temperature=3.0, seed=seed) for seed in (1, 2)]
    greedy = join(batch, [3, 1, 4])
    penalised = join(batch, [3, 1, 4], repetition_penalty=2.0)
    while batch.step():
        pass
    assert completion(first) == completion(others[0]) == alone(1) != completion(others[1]) == alone(2)
    assert completion(greedy) == expected([3, 1, 4], 8)
    assert completion(penalised) == alone(0, temperature=0.0, repetition_penalty=2.0)


def test_bad_requests_are_refused_before_anything_runs_and_leave_the_batch_as_it_was() -> None:
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


def test_a_row_without_finite_logits_leaves_alone() -> None:
    graph = FakeBatchGraph()
    batch = Batch(graph, 3)
    rows = [join(batch, [3, place]) for place in range(3)]
    step = batch._rows.step
    batch._rows.step = lambda tokens: step(tokens) * [[1], [np.nan], [1]]  # type: ignore[method-assign]
    assert [row for row, _token in batch.step()] == [rows[0], rows[2]]
    assert rows[1].finish_reason == "error" and isinstance(rows[1].error, ModelFormatError)
    batch._rows.step = step  # type: ignore[method-assign]
    while batch.step():
        pass
    assert completion(rows[0]) == expected([3, 0], 8) and completion(rows[2]) == expected([3, 2], 8)


# -- on graphs: one run for all rows -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma"])
def graph(request: pytest.FixtureRequest) -> Graph:
    """Tiny Llama has one slot a layer; tiny Gemma every slot, and layers with a window of 8."""
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


def some_patches(graph: Graph) -> dict[str, BoundPatch]:
    """Ranks, strengths, sums, a bias alone, a part of the slots, a KV prefix with and without deltas, and none."""
    folder = graph.folder
    narrow, wide = (patch_for(folder, seed=rank, rank=rank, scale=0.2) for rank in (3, 20))
    bias = patch_for(folder, seed=3, rank=0, scale=0.2)
    part = {key: Delta(bias=d.bias) if key[0] else d for key, d in list(narrow.deltas.items())[:-1]}
    patches = {
        "base": None,
        "narrow": narrow,
        "wide": wide,
        "half": 0.5 * narrow,
        "sum": narrow - 0.5 * wide,
        "bias": bias,
        "part": Patch(part, narrow.config),
        "prefix": with_prefix(Patch({}, narrow.config), folder, LEAD),
        "prefix and deltas": with_prefix(wide, folder, LEAD, entries=12, position=12),
    }
    return {name: graph.bind(patch) for name, patch in patches.items()}


class Alone:
    """A sequence by itself, greedily, and the logits of every step."""

    def __init__(self, graph: Graph, prompt: list[int], bound: BoundPatch, count: int) -> None:
        cache, tokens = graph.new_cache(bound), list(prompt)
        self.logits = []
        for _ in range(count):
            self.logits.append(graph.forward(tokens[cache.keep_prefix(tokens) :], cache, bound)[0])
            tokens.append(int(self.logits[-1].argmax()))
        self.tokens = tokens


class Watched:
    """A batch, with the logits of every row's steps."""

    def __init__(self, graph: Graph, rows: int, prefill_tokens: int = 32) -> None:
        self.batch = Batch(graph, rows, prefill_tokens=prefill_tokens)
        self.logits: dict[Row, list[Any]] = {}
        step = self.batch._rows.step

        def recorded(tokens: Sequence[int]) -> np.ndarray:
            logits = step(tokens)
            for row, found in zip(self.batch.rows, logits, strict=True):
                self.logits.setdefault(row, []).append(found.copy())
            return logits

        self.batch._rows.step = recorded  # type: ignore[method-assign]

    def run(self) -> None:
        while self.batch.step():
            pass

    def assert_is(self, row: Row, alone: Alone) -> None:
        assert row.tokens == alone.tokens[: len(row.tokens)]
        for ours, theirs in zip(self.logits[row], alone.logits, strict=False):
            assert furthest(ours, theirs) < 1e-5


def prompts(count: int) -> list[list[int]]:
    """Of different lengths, from one id after what a KV prefix stands in for."""
    return [[*LEAD, *token_ids(1 + 7 * place, seed=place)] for place in range(count)]


def test_rows_under_one_patch_bind_it_as_it_is(graph: Graph) -> None:
    for name in ("base", "wide"):
        bound = some_patches(graph)[name]
        watched = Watched(graph, 4)
        rows = [join(watched.batch, prompt, bound, 12) for prompt in prompts(4)]
        watched.run()
        assert not watched.batch._rows._slots._arrays  # type: ignore[attr-defined]
        for row, prompt in zip(rows, prompts(4), strict=True):
            watched.assert_is(row, Alone(graph, prompt, bound, 12))


def test_rows_under_different_patches_and_of_different_lengths(graph: Graph) -> None:
    bounds = some_patches(graph)
    watched = Watched(graph, len(bounds))
    rows = {
        name: join(watched.batch, prompt, bound, 20)
        for (name, bound), prompt in zip(bounds.items(), prompts(len(bounds)), strict=True)
    }
    watched.run()
    for (name, row), prompt in zip(rows.items(), prompts(len(bounds)), strict=True):
        assert len(completion(row)) == 20
        watched.assert_is(row, Alone(graph, prompt, bounds[name], 20))


def test_rows_that_differ_in_their_biases_alone(graph: Graph) -> None:
    """Stacks of rank 0, then of more once a row needs it."""
    bounds, watched = some_patches(graph), Watched(graph, 3)
    rows = [(name, join(watched.batch, [*LEAD, 9], bounds[name], 8)) for name in ("base", "bias")]
    watched.batch.step()
    rows.append(("narrow", join(watched.batch, [*LEAD, 9], bounds["narrow"], 8)))
    watched.run()
    for name, row in rows:
        watched.assert_is(row, Alone(graph, [*LEAD, 9], bounds[name], 8))


def test_joining_and_leaving_midway_does_not_disturb_the_others(graph: Graph) -> None:
    """Rows move into the places of those that left; the patches of a place change, and their ranks grow."""
    bounds, given_prompts = list(some_patches(graph).values()), prompts(9)
    watched, rows = Watched(graph, 4), []
    for place, (bound, prompt) in enumerate(zip(bounds, given_prompts, strict=True)):
        if not watched.batch.free:
            watched.batch.leave(watched.batch.rows[place % 3])
        rows.append(join(watched.batch, prompt, bound, 30))
        for _ in range(3):
            watched.batch.step()
    watched.run()
    assert {row.finish_reason for row in rows} == {"left", "length"}
    for row, bound, prompt in zip(rows, bounds, given_prompts, strict=True):
        assert len(completion(row)) >= 3
        watched.assert_is(row, Alone(graph, prompt, bound, 30))


def test_a_long_prompt_is_run_in_pieces_between_the_tokens_of_others(graph: Graph) -> None:
    bounds, prompt = some_patches(graph), [*LEAD, *token_ids(60, seed=4)]
    watched = Watched(graph, 3, prefill_tokens=7)
    going = {name: join(watched.batch, [*LEAD, 9], bounds[name], 30) for name in ("narrow", "base")}
    watched.batch.step()
    late = join(watched.batch, prompt, bounds["prefix and deltas"], 10)
    for _ in range(8):
        assert {row for row, _token in watched.batch.step()} == set(going.values())
    assert watched.batch.joining == (late,)
    assert {row for row, _token in watched.batch.step()} == {late, *going.values()}
    watched.run()
    watched.assert_is(late, Alone(graph, prompt, bounds["prefix and deltas"], 10))
    for name, row in going.items():
        watched.assert_is(row, Alone(graph, [*LEAD, 9], bounds[name], 30))


def test_buffers_grow_under_the_rows_up_to_the_window(graph: Graph) -> None:
    bounds, watched = some_patches(graph), Watched(graph, 3)
    window = graph.folder.context_window
    near, far = token_ids(240, seed=1), token_ids(window - 30, seed=2)
    first = join(watched.batch, near, bounds["narrow"], 40)
    for _ in range(10):
        watched.batch.step()
    second = join(watched.batch, far, bounds["base"], 40)
    watched.run()
    watched.assert_is(first, Alone(graph, near, bounds["narrow"], 40))
    watched.assert_is(second, Alone(graph, far, bounds["base"], 30))
    assert len(second.tokens) == window and second.finish_reason == "length"


def test_a_device_that_does_not_share_memory(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: buffers are copied there and back at every change of rows."""
    monkeypatch.setattr(StackedKV, "bind", copying_bind)
    test_joining_and_leaving_midway_does_not_disturb_the_others(graph)


def copying_bind(self: Any, binding: Any, count: int) -> None:
    self._shared = False
    for past, present in self._names:
        value = self._values[past] = self._to_device(self._arrays[past][:count].copy())
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)


def test_a_failed_step_can_be_tried_again(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = some_patches(graph)
    watched = Watched(graph, 3)
    rows = [join(watched.batch, [*LEAD, 9], bounds[name], 6) for name in ("narrow", "prefix")]
    watched.batch.step()

    def fail(*_a: Any, **_k: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(graph, "execute", fail)
        late = join(watched.batch, [*LEAD, 9, 9], bounds["base"])
        with pytest.raises(MemoryError):
            watched.batch.step()
    assert late.finish_reason == "error" and isinstance(late.error, MemoryError)
    assert list(watched.batch.rows) == rows and not watched.batch.joining
    watched.run()
    for row, name in zip(rows, ("narrow", "prefix"), strict=True):
        watched.assert_is(row, Alone(graph, [*LEAD, 9], bounds[name], 6))


def test_requests_that_a_graph_refuses(graph: Graph) -> None:
    batch, bounds = Batch(graph, 2), some_patches(graph)
    row = join(batch, [1, 2, 3], bounds["narrow"])
    for prompt in ([1, graph.folder.vocab_size], [-1], [1.5, 2]):
        with pytest.raises(RequestError, match="tokens"):
            join(batch, prompt, bounds["base"])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="does not start as the patch"):
        join(batch, [1, 2, 3, 4], bounds["prefix"])
    with pytest.raises(RequestError, match="at least one more"):
        join(batch, LEAD, bounds["prefix"])
    assert batch.joining == (row,) and not batch.rows
    with pytest.raises(StaleCacheError):
        batch._rows.add(graph.new_cache(bounds["half"]), bounds["narrow"])


def test_rows_of_a_patch_are_checked_against_the_batch(graph: Graph) -> None:
    """ONNX would broadcast a batch of one over them and give out the first row's logits."""
    bound = some_patches(graph)["narrow"]
    two = {
        name: graph.ort.OrtValue.ortvalue_from_numpy(np.concatenate([value.numpy()] * 2))
        for name, value in bound.values.items()
    }
    stacked = BoundPatch(two, bound.key)
    with pytest.raises(PatchShapeError, match="rows of a slot tensor do not match the batch"):
        graph.run([1, 2, 3], stacked)
    batch = Batch(graph, 4)
    for _ in range(3):
        join(batch, [1], stacked)
    with pytest.raises(PatchShapeError, match="1 or 3"):
        batch.step()


@pytest.mark.parametrize("name", ["tiny-llama-int8", "tiny-llama-int4"])
def test_rows_of_a_quantised_graph_differ_no_more_under_patches_than_without(name: str, tmp_path: Path) -> None:
    """Its kernels round differently with the number of rows."""
    graph = Graph(ModelFolder.open(private_copy(name, tmp_path)), "cpu")

    def furthest_row(bounds: Sequence[BoundPatch]) -> float:
        watched = Watched(graph, len(bounds))
        rows = [join(watched.batch, p, b, 1) for p, b in zip(prompts(len(bounds)), bounds, strict=True)]
        watched.run()
        alone = [Alone(graph, p, b, 1).logits[0] for p, b in zip(prompts(len(bounds)), bounds, strict=True)]
        return max(furthest(watched.logits[row][0], one) for row, one in zip(rows, alone, strict=True))

    bounds = list(some_patches(graph).values())
    assert furthest_row(bounds) <= 3 * furthest_row([graph.base] * len(bounds)) + 1e-4


# -- graphs of the other route -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def concatenating(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = private_copy("tiny-llama-optimum", tmp_path_factory.mktemp("export"))
    return Graph(ModelFolder.open(path), "cpu")


def test_a_graph_that_concatenates_steps_its_rows_in_turn(
    concatenating: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_joining_and_leaving_midway_does_not_disturb_the_others(concatenating)
    # A step that fails at its second row has not happened for the first either.
    bounds = some_patches(concatenating)
    watched = Watched(concatenating, 2)
    rows = [join(watched.batch, [*LEAD, 9], bounds[name], 6) for name in ("narrow", "wide")]
    watched.batch.step()
    forward = concatenating.forward
    with monkeypatch.context() as patched:
        patched.setattr(
            concatenating,
            "forward",
            lambda tokens, cache, bound: forward(tokens, cache, bound) if cache is rows[0].cache else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            watched.batch.step()
    watched.run()
    for row, name in zip(rows, ("narrow", "wide"), strict=True):
        watched.assert_is(row, Alone(concatenating, [*LEAD, 9], bounds[name], 6))

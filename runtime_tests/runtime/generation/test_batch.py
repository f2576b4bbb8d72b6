"""A running batch on token ids: every row generates what it would as a single sequence, whatever other rows do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from tp_runtime.generation import Batch, Row, Sampler, Sampling, engine
from tp_runtime.generation.row_kv import StackedKV
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import BoundPatch, DeviceCopies, Graph, Lengths, ModelFolder

LEAD = [5, 6, 7]  # the ids that the KV prefixes replace
GREEDY = Sampling()


# -- the loop, on a fake graph -------------------------------------------------------------------------------


def join(batch: Batch, prompt: Sequence[int], bound: BoundPatch = BASE, n: Any = 8, **options: Any) -> Row:
    eos = frozenset(options.pop("eos", ()))
    return batch.join(prompt, bound, sampler=Sampler(Sampling(**options)), max_new_tokens=n, eos_ids=eos)


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


# -- on graphs: one run for all rows -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma"])
def graph(request: pytest.FixtureRequest) -> Graph:
    """Tiny Llama has one slot in each layer; tiny Gemma has every slot, and layers with a sliding window of 8."""
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


def some_patches(graph: Graph) -> dict[str, BoundPatch]:
    """Return patches of several ranks and strengths, a sum, only a bias, some slots, KV prefixes, and the base.

    If the graph has full and windowed layers, some KV prefixes have other numbers of entries for each kind.
    """
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
    if folder.windowed is not None:
        patches["fewer entries in windowed layers"] = with_prefix(wide, folder, LEAD, Lengths(20, 6), 25)
        patches["more entries in windowed layers"] = with_prefix(
            Patch({}, bias.config), folder, LEAD, Lengths(4, 13), 14
        )
    return {name: graph.bind(patch) for name, patch in patches.items()}


class SingleSequence:
    """A single sequence that is decoded greedily on the graph.

    Attributes:
        tokens: the prompt and the completion.
        logits: the logits [vocab] of every step.
    """

    def __init__(self, graph: Graph, prompt: list[int], bound: BoundPatch, count: int) -> None:
        cache, tokens = graph.new_cache(bound), list(prompt)
        self.logits = []
        for _ in range(count):
            self.logits.append(graph.forward(tokens[cache.keep_prefix(tokens) :], cache, bound)[0])
            tokens.append(int(self.logits[-1].argmax()))
        self.tokens = tokens


class RecordedBatch:
    """A batch that records logits.

    Attributes:
        batch: the batch.
        logits: the logits [vocab] of every step, by row.
    """

    def __init__(self, graph: Graph, rows: int, prefill_tokens: int = 32) -> None:
        self.batch = Batch(graph, rows, prefill_tokens=prefill_tokens)
        self.logits: dict[Row, list[Any]] = {}
        step = self.batch._rows.step

        def step_and_record(rows: Sequence[Row]) -> np.ndarray:
            logits = step(rows)
            for row, row_logits in zip(rows, logits, strict=True):
                self.logits.setdefault(row, []).append(row_logits.copy())
            return logits

        self.batch._rows.step = step_and_record  # type: ignore[method-assign]

    def run(self) -> None:
        while self.batch.step():
            pass

    def assert_matches(self, row: Row, single: SingleSequence) -> None:
        assert row.tokens == single.tokens[: len(row.tokens)]
        for got, wanted in zip(self.logits[row], single.logits, strict=False):
            assert furthest(got, wanted) < 1e-5


def prompts(count: int) -> list[list[int]]:
    """Return prompts of different lengths; the shortest has one id after the ids that a KV prefix replaces."""
    return [[*LEAD, *token_ids(1 + 7 * i, seed=i)] for i in range(count)]


def test_rows_with_the_same_patch_bind_it_without_stacking(graph: Graph) -> None:
    for name in ("base", "wide"):
        bound = some_patches(graph)[name]
        recorded = RecordedBatch(graph, 4)
        rows = [join(recorded.batch, prompt, bound, 12) for prompt in prompts(4)]
        recorded.run()
        assert not recorded.batch._rows._slots._arrays  # type: ignore[attr-defined]
        for row, prompt in zip(rows, prompts(4), strict=True):
            recorded.assert_matches(row, SingleSequence(graph, prompt, bound, 12))


def test_rows_with_different_patches_and_lengths_match_single_sequences(graph: Graph) -> None:
    bounds = some_patches(graph)
    recorded = RecordedBatch(graph, len(bounds))
    rows = {
        name: join(recorded.batch, prompt, bound, 20)
        for (name, bound), prompt in zip(bounds.items(), prompts(len(bounds)), strict=True)
    }
    recorded.run()
    for (name, row), prompt in zip(rows.items(), prompts(len(bounds)), strict=True):
        assert len(completion(row)) == 20
        recorded.assert_matches(row, SingleSequence(graph, prompt, bounds[name], 20))


def test_rows_that_differ_only_in_their_biases_match_single_sequences(graph: Graph) -> None:
    """The stacked slot tensors have rank 0 until a row needs a higher rank."""
    bounds, recorded = some_patches(graph), RecordedBatch(graph, 3)
    rows = [(name, join(recorded.batch, [*LEAD, 9], bounds[name], 8)) for name in ("base", "bias")]
    recorded.batch.step()
    rows.append(("narrow", join(recorded.batch, [*LEAD, 9], bounds["narrow"], 8)))
    recorded.run()
    for name, row in rows:
        recorded.assert_matches(row, SingleSequence(graph, [*LEAD, 9], bounds[name], 8))


def test_rows_that_join_and_leave_midway_do_not_disturb_the_others(graph: Graph) -> None:
    """Rows take the batch positions of rows that left, so the patch of a position changes, and the ranks grow."""
    bounds = list(some_patches(graph).values())
    given_prompts = prompts(len(bounds))
    recorded, rows = RecordedBatch(graph, 4), []
    for number, (bound, prompt) in enumerate(zip(bounds, given_prompts, strict=True)):
        if not recorded.batch.free:
            recorded.batch.leave(recorded.batch.rows[number % 3])
        rows.append(join(recorded.batch, prompt, bound, 30))
        for _ in range(3):
            recorded.batch.step()
    recorded.run()
    assert {row.finish_reason for row in rows} == {"left", "length"}
    for row, bound, prompt in zip(rows, bounds, given_prompts, strict=True):
        assert len(completion(row)) >= 3
        recorded.assert_matches(row, SingleSequence(graph, prompt, bound, 30))


def test_a_long_prompt_is_prefilled_in_chunks_while_other_rows_decode(graph: Graph) -> None:
    bounds, prompt = some_patches(graph), [*LEAD, *token_ids(60, seed=4)]
    recorded = RecordedBatch(graph, 3, prefill_tokens=7)
    decoding = {name: join(recorded.batch, [*LEAD, 9], bounds[name], 30) for name in ("narrow", "base")}
    recorded.batch.step()
    late = join(recorded.batch, prompt, bounds["prefix and deltas"], 10)
    for _ in range(8):
        assert {row for row, _token in recorded.batch.step()} == set(decoding.values())
    assert recorded.batch.joining == (late,)
    assert {row for row, _token in recorded.batch.step()} == {late, *decoding.values()}
    recorded.run()
    recorded.assert_matches(late, SingleSequence(graph, prompt, bounds["prefix and deltas"], 10))
    for name, row in decoding.items():
        recorded.assert_matches(row, SingleSequence(graph, [*LEAD, 9], bounds[name], 30))


def test_buffers_grow_up_to_the_context_window_while_rows_decode(graph: Graph) -> None:
    bounds, recorded = some_patches(graph), RecordedBatch(graph, 3)
    window = graph.folder.context_window
    near, far = token_ids(240, seed=1), token_ids(window - 30, seed=2)
    first = join(recorded.batch, near, bounds["narrow"], 40)
    for _ in range(10):
        recorded.batch.step()
    second = join(recorded.batch, far, bounds["base"], 40)
    recorded.run()
    recorded.assert_matches(first, SingleSequence(graph, near, bounds["narrow"], 40))
    recorded.assert_matches(second, SingleSequence(graph, far, bounds["base"], 30))
    assert len(second.tokens) == window and second.finish_reason == "length"


@pytest.mark.parametrize(
    "scenario",
    [
        test_rows_that_join_and_leave_midway_do_not_disturb_the_others,
        test_buffers_grow_up_to_the_context_window_while_rows_decode,
    ],
)
def test_rows_match_single_sequences_where_the_device_copies_their_buffers(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Graph], None]
) -> None:
    """As on CUDA: caches grow, and rows join, move and leave, by copies that ONNX Runtime makes."""
    monkeypatch.setattr(graph.kv, "copies", DeviceCopies(graph.ort, graph.device, graph.dtype))
    monkeypatch.setattr(StackedKV, "__init__", lambda *_a, **_k: pytest.fail("the rows are on the host"))
    scenario(graph)


def test_a_failed_step_can_be_tried_again(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = some_patches(graph)
    recorded = RecordedBatch(graph, len(bounds))
    names = [name for name in bounds if name != "base"]
    rows = [join(recorded.batch, [*LEAD, 9], bounds[name], 6) for name in names]
    recorded.batch.step()

    def fail(*_a: Any, **_k: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(graph, "execute", fail)
        late = join(recorded.batch, [*LEAD, 9, 9], bounds["base"])
        with pytest.raises(MemoryError):
            recorded.batch.step()
    assert late.finish_reason == "error" and isinstance(late.error, MemoryError)
    assert list(recorded.batch.rows) == rows and not recorded.batch.joining
    recorded.run()
    for row, name in zip(rows, names, strict=True):
        recorded.assert_matches(row, SingleSequence(graph, [*LEAD, 9], bounds[name], 6))


def test_requests_that_do_not_fit_the_graph_or_the_patch_are_refused(graph: Graph) -> None:
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
    row.cache = graph.new_cache(bounds["half"])
    with pytest.raises(StaleCacheError):
        batch._rows.prepare([row])


def test_slot_tensors_whose_rows_do_not_match_the_batch_are_refused(graph: Graph) -> None:
    """Without the check, ONNX would broadcast a batch of one over the rows and return the logits of the first row."""
    bound = some_patches(graph)["narrow"]
    two = {
        name: graph.ort.OrtValue.ortvalue_from_numpy(np.concatenate([value.numpy()] * 2))
        for name, value in bound.values.items()
    }
    stacked = BoundPatch(lambda: two, bound.key)
    with pytest.raises(PatchShapeError, match="rows of a slot tensor do not match the batch"):
        graph.run([1, 2, 3], stacked)
    batch = Batch(graph, 4)
    for _ in range(3):
        join(batch, [1], stacked)
    with pytest.raises(PatchShapeError, match="1 or 3"):
        batch.step()


@pytest.mark.parametrize("name", ["tiny-llama-int8", "tiny-llama-int4"])
def test_rows_of_a_quantised_graph_differ_no_more_with_patches_than_without(name: str, tmp_path: Path) -> None:
    """The kernels of a quantised graph round differently for different numbers of rows."""
    graph = Graph(ModelFolder.open(private_copy(name, tmp_path)), "cpu")

    def furthest_row(bounds: Sequence[BoundPatch]) -> float:
        recorded = RecordedBatch(graph, len(bounds))
        rows = [join(recorded.batch, p, b, 1) for p, b in zip(prompts(len(bounds)), bounds, strict=True)]
        recorded.run()
        single = [SingleSequence(graph, p, b, 1).logits[0] for p, b in zip(prompts(len(bounds)), bounds, strict=True)]
        return max(furthest(recorded.logits[row][0], one) for row, one in zip(rows, single, strict=True))

    bounds = list(some_patches(graph).values())
    assert furthest_row(bounds) <= 3 * furthest_row([graph.base] * len(bounds)) + 1e-4


# -- graphs of the optimum route -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def concatenating(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = private_copy("tiny-llama-optimum", tmp_path_factory.mktemp("export"))
    return Graph(ModelFolder.open(path), "cpu")


def test_a_graph_that_concatenates_steps_its_rows_one_by_one(
    concatenating: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_rows_that_join_and_leave_midway_do_not_disturb_the_others(concatenating)
    # If a step fails at its second row, the first row has not stepped either.
    bounds = some_patches(concatenating)
    recorded = RecordedBatch(concatenating, 2)
    rows = [join(recorded.batch, [*LEAD, 9], bounds[name], 6) for name in ("narrow", "wide")]
    recorded.batch.step()
    forward = concatenating.forward
    with monkeypatch.context() as patched:
        patched.setattr(
            concatenating,
            "forward",
            lambda tokens, cache, *a, **k: forward(tokens, cache, *a, **k) if cache is rows[0].cache else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            recorded.batch.step()
    recorded.run()
    for row, name in zip(rows, ("narrow", "wide"), strict=True):
        recorded.assert_matches(row, SingleSequence(concatenating, [*LEAD, 9], bounds[name], 6))

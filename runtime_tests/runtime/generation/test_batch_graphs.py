"""A running batch on exported graphs: every row gets the ids and the logits of a single sequence.

A graph of the fused route runs all rows at once. One of the optimum route concatenates, and steps its rows one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.committed import private_copy
from runtime_tests.logits import furthest, token_ids
from tp_runtime.errors import PatchShapeError, RequestError, StaleCacheError
from tp_runtime.generation import Batch
from tp_runtime.generation.row_kv import StackedKV
from tp_runtime.session import BoundPatch, DeviceCopies, Graph, ModelFolder

from .batches import LEAD, RecordedBatch, SingleSequence, completion, join, prompts, some_patches

# -- on graphs: one run for all rows -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma"])
def graph(request: pytest.FixtureRequest) -> Graph:
    """Tiny Llama has one slot in each layer; tiny Gemma has every slot, and layers with a sliding window of 8."""
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


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

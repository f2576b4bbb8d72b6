"""Failures within a step of a batch: wherever the step fails, a repetition continues every row as if it had not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.failures import Failure, run_and_repeat
from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from tp_runtime.generation import Batch, PrefixCache, Row, Sampler, Sampling, generate
from tp_runtime.session import BoundPatch, Graph, ModelFolder

SHARED = token_ids(5, seed=1)


class Play:
    """A batch whose rows join, step, draw, end and leave under several patches, with a prefix cache.

    Attributes:
        rows: the rows in the order in which they joined.
        returned: for each row the ids that the steps have returned.
    """

    def __init__(self, graph: Graph, bounds: list[BoundPatch]) -> None:
        self.bounds = bounds
        self.batch = Batch(graph, 3, PrefixCache(1 << 20), prefill_tokens=4)
        self.rows: list[Row] = []
        self.returned: dict[Row, list[int]] = {}

    def join(self, number: int, bound: int, prompt: list[int], new_tokens: int, **sampling: Any) -> None:
        """Add a row, unless it has joined already."""
        if number == len(self.rows):
            options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_ids": frozenset()}
            row = self.batch.join(prompt, self.bounds[bound], sampler=Sampler(Sampling(**sampling)), **options)
            self.rows.append(row)
            self.returned[row] = []

    def step(self) -> None:
        for row, token in self.batch.step():
            self.returned[row].append(token)

    def actions(self) -> Iterator[Callable[[], None]]:
        """Return the calls of the play one by one. Each of them may be repeated if it fails."""
        yield lambda: self.join(0, 1, [*SHARED, 3], 5)
        yield lambda: self.join(1, 0, [9], 2, temperature=1.5, seed=3, top_p=0.9)
        yield self.step
        yield lambda: self.join(2, 1, [*SHARED, 8, 8], 2, temperature=2.0, seed=4, repetition_penalty=1.2)
        yield self.step  # row 1 ends
        yield lambda: self.join(3, 2, [*SHARED, 8, 8, 6, 7], 8)
        yield self.step
        yield self.step
        yield lambda: self.batch.leave(self.rows[3])
        while self.batch.rows or self.batch.joining:
            yield self.step

    def run(self, disturbed: int = -1, failure: Failure | None = None) -> None:
        """Run the play; the call of that number fails and is repeated."""
        run_and_repeat(self.actions(), disturbed, failure)


def some_patches(graph: Graph) -> list[BoundPatch]:
    folder = graph.folder
    return [graph.base, *(graph.bind(patch_for(folder, seed=rank, rank=rank, scale=0.3)) for rank in (2, 5))]


def count(graph: Graph, bounds: list[BoundPatch], kind: str) -> list[int]:
    """Return for each call of the play the number of points at which it can fail."""
    play, points = Play(graph, bounds), []
    for action in play.actions():
        failure = Failure(kind)
        failure.run(action)
        points.append(failure.passed)
    return points


def assert_every_failure_is_harmless(graph: Graph, kind: str, error: type[BaseException], every: int = 1) -> None:
    """Repeat the play once for every `every`-th point of each of its calls, with `error` raised there."""
    bounds = some_patches(graph)
    undisturbed = Play(graph, bounds)
    undisturbed.run()
    wanted = [alone(graph, row) for row in undisturbed.rows]
    for number, points in enumerate(count(graph, bounds, kind)):
        for at in range(number % every, points, every):
            play = Play(graph, bounds)
            play.run(number, Failure(kind, at, error))
            for row, before, whole in zip(play.rows, undisturbed.rows, wanted, strict=True):
                got, place = row.tokens[row.prompt_tokens :], f"call {number}, point {at}"
                assert play.returned[row] == got == whole[: len(got)], place
                if row.finish_reason == "error":
                    assert type(row.error) is error is MemoryError, place
                else:
                    assert row.finish_reason == before.finish_reason, place
                    assert row.finish_reason == "left" or got == whole, place
            assert not play.batch.rows and play.batch.free == 3


def alone(graph: Graph, row: Row) -> list[int]:
    """Return the completion of a row's request as a single sequence."""
    ids = generate(
        graph,
        row.tokens[: row.prompt_tokens],
        row.bound,
        sampler=Sampler(row.sampler.sampling),
        max_new_tokens=row.token_limit - row.prompt_tokens,
        eos_ids=row.eos_ids,
    )
    return list(ids)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-llama-optimum"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A graph whose rows run together, and one whose rows run one by one."""
    return Graph(ModelFolder.open(private_copy(request.param, tmp_path_factory.mktemp("export"))), "cpu", threads=1)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["lines", "calls"])
def test_a_call_that_fails_anywhere_can_be_repeated(graph: Graph, kind: str, error: type[BaseException]) -> None:
    assert_every_failure_is_harmless(graph, kind, error, every=31)


def test_a_row_whose_choice_fails_ends_alone(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its sampler raises: the other rows get the ids of this step."""
    play = Play(graph, some_patches(graph))
    play.join(0, 1, [*SHARED, 3], 4)
    play.join(1, 0, [9], 4, temperature=1.5, seed=3)
    play.join(2, 2, [*SHARED, 8], 4)
    play.step()
    before = list(play.rows[1].tokens)

    def overflow(*_args: object) -> int:
        raise OverflowError("int too large to convert to float")

    monkeypatch.setattr(play.rows[1].sampler, "pick", overflow)
    while play.batch.rows:
        play.step()
    assert play.rows[1].finish_reason == "error" and isinstance(play.rows[1].error, OverflowError)
    assert play.rows[1].tokens == before
    for row in (play.rows[0], play.rows[2]):
        assert play.returned[row] == alone(graph, row)


def test_a_row_ends_although_the_prefix_cache_cannot_store_it(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(graph, some_patches(graph))
    play.join(0, 1, [*SHARED, 3], 2)
    play.join(1, 0, [9], 4)
    play.step()

    def fail(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PrefixCache, "keep", fail)
    play.step()
    assert play.rows[0].finish_reason == "length" and play.batch.rows == (play.rows[1],)
    play.batch.leave(play.rows[1])
    assert play.rows[1].finish_reason == "left" and play.batch.free == 3


def test_the_other_rows_go_on_if_all_running_rows_fail_at_once(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty result means that no row is left, so the step goes on with the prompts that still join."""
    play = Play(graph, some_patches(graph))
    play.join(0, 0, [9], 4, temperature=1.0)
    play.step()
    play.join(1, 0, [*SHARED, *SHARED, 3], 2)
    monkeypatch.setattr(play.rows[0].sampler, "pick", lambda *_args: 1 / 0)
    play.step()
    assert play.rows[0].finish_reason == "error" and len(play.returned[play.rows[1]]) == 1

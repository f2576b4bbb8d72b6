"""Failures within a batch of texts: no id and no text is lost, handed out twice, or changed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.failures import Failure, run_and_repeat
from runtime_tests.interrupts import interrupted_at_every_step
from runtime_tests.patches import patch_for
from tp_runtime.errors import RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.text import Completion, TextBatch

REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("Hi", {"patch": "p", "max_new_tokens": 4}),
    ("Hi", {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}),
    ("Hi there", {"patch": "p", "strength": 0.5, "max_new_tokens": 3, "temperature": 2.0, "seed": 5}),
    ("Ho", {"max_new_tokens": 30}),
    ("Ho", {"max_new_tokens": 30}),
]


@pytest.fixture(scope="module")
def failing(tiny_llama_export: Path) -> PatchedModel:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=1 << 20, threads=1)
    model.codec.eos_ids = frozenset()
    model.load_patch(patch_for(model.graph.folder, seed=1, scale=0.5), "p")
    return model


@pytest.fixture(scope="module")
def alone(failing: PatchedModel) -> list[tuple[str, list[int]]]:
    """The text and the ids of each request as a single stream; the second request ends at a stop string."""
    found = []
    for prompt, options in REQUESTS:
        stream = failing.stream(prompt, **options)
        text = "".join(stream)
        found.append((text, stream.token_ids))
    return found


class Play:
    """A batch whose completions wait, step, end, stop at a stop string, and are closed while running and waiting.

    Attributes:
        completions: the completions in the order of REQUESTS.
        returned: for each completion the text that the steps have returned.
    """

    def __init__(self, model: PatchedModel, stop: str) -> None:
        model.prefix_cache.clear()  # type: ignore[union-attr]
        self.batch = model.batch(rows=2, prefill_tokens=16)
        self.stop = stop
        self.completions: list[Completion] = []
        self.returned: dict[Completion, str] = {}
        self._stepped = True

    def add(self, number: int) -> None:
        """Add the completion of a request, unless it was added already."""
        if number == len(self.completions):
            prompt, options = REQUESTS[number]
            self.completions.append(self.batch.add(prompt, **options, stop=[self.stop] if number == 1 else []))
            self.returned[self.completions[number]] = ""

    def step(self) -> None:
        stepped = self.batch.step()
        for completion, text in stepped:
            self.returned[completion] += text
        self._stepped = bool(stepped)

    def actions(self) -> Iterator[Callable[[], None]]:
        """Return the calls of the play one by one. Each of them may be repeated if it fails."""
        for number in range(4):
            yield lambda number=number: self.add(number)
        yield self.step
        yield lambda: self.add(4)
        yield self.completions[4].close
        while self._stepped:
            if self.completions[3].token_ids:
                yield self.completions[3].close
            yield self.step

    def run(self, disturbed: int = -1, failure: Failure | None = None) -> None:
        """Run the play; the call of that number fails and is repeated."""
        # A template that fails is a RequestError.
        run_and_repeat(self.actions(), disturbed, failure, (MemoryError, KeyboardInterrupt, RequestError))


@pytest.mark.parametrize(
    ("kind", "error"),
    [("lines", MemoryError), ("lines", KeyboardInterrupt), ("calls", MemoryError), ("calls", KeyboardInterrupt)],
)
def test_a_call_that_fails_anywhere_loses_no_text(
    failing: PatchedModel, alone: list[tuple[str, list[int]]], kind: str, error: type[BaseException], every: int = 53
) -> None:
    stop = alone[1][0][3:5]
    for number, points in enumerate(points_of(failing, stop, kind)):
        for at in range(number % every, points, every):
            play, place = Play(failing, stop), f"call {number}, point {at}"
            play.run(number, Failure(kind, at, error))
            play.batch.close()
            for i, (completion, (text, ids)) in enumerate(zip(play.completions, alone, strict=True)):
                assert play.returned[completion] == completion.text, place
                assert completion.token_ids == ids[: len(completion.token_ids)], place
                if completion.finish_reason == "error":
                    assert type(completion.error) is error is MemoryError and text.startswith(completion.text), place
                elif i < 3:
                    wanted = text[: text.index(stop)] if i == 1 else text
                    reason = "stop" if i == 1 else "length"
                    assert (completion.text, completion.finish_reason) == (wanted, reason), place
                else:
                    assert completion.finish_reason in ("closed", "length"), place
                    assert text.startswith(completion.text), place


def points_of(model: PatchedModel, stop: str, kind: str) -> list[int]:
    """Return for each call of the play the number of points at which it can fail."""
    play, points = Play(model, stop), []
    for action in play.actions():
        failure = Failure(kind)
        failure.run(action)
        points.append(failure.passed)
    return points


class _Yielding:
    """A lock that lets another thread run as soon as a block under it has failed, before the block's caller goes on.

    Args:
        other: what the other thread runs.
    """

    def __init__(self, other: Callable[[], None]) -> None:
        self._lock, self._other = threading.RLock(), other

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._lock.release()
        if kind is not None:
            thread = threading.Thread(target=self._other)
            thread.start()
            thread.join()


def test_another_thread_that_steps_after_a_failure_gets_each_text_once_and_in_order(
    failing: PatchedModel,
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 2.0, "seed": 4}
    text = "".join(failing.stream("Hi", **options))
    for at in count():
        batch, got = TextBatch(failing.graph, failing.encoder, 1), [""]
        completion = batch.add("Hi", **options)

        def step(batch: TextBatch = batch, got: list[str] = got) -> None:
            got[0] += "".join(new for _completion, new in batch.step())

        for _ in range(3):
            step()
        failure = Failure("lines", at)
        batch._lock = _Yielding(step)  # type: ignore[assignment]
        with suppress(KeyboardInterrupt):
            failure.run(step)
        while completion.finish_reason is None:
            step()
        step()  # what a failed step held back
        assert got[0] == completion.text == text, f"point {at}"
        if failure.passed <= at:
            return


def test_a_failure_in_the_step_that_finds_nothing_left_does_not_hide_a_later_completion(failing: PatchedModel) -> None:
    """An empty list means that no completion is left, and a loop over the steps ends there."""
    idle = Failure("lines")
    idle.run(failing.batch(rows=1).step)
    for at in range(idle.passed):
        with failing.batch(rows=1) as batch:
            with suppress(KeyboardInterrupt):
                Failure("lines", at).run(batch.step)
            batch.add("Hi", max_new_tokens=1)
            assert batch.step(), f"point {at}"


def test_an_interrupt_anywhere_keeps_no_patch_of_a_batch_in_use(failing: PatchedModel) -> None:
    """Also within the standard library, before a context manager's exit has had any effect."""
    loaded, files = failing._patches.by_name("p"), ("contextlib.py", "loaded_patches.py", "text/batch.py", "uses.py")
    batch = failing.batch(rows=1)
    gc.collect()
    gc.disable()  # it would end what only a cycle of an exception and its frames keeps
    try:
        for place in interrupted_at_every_step(lambda: batch.add("Hi", patch="p").close(), files):
            for completion in list(batch._completions):
                completion.close()
            assert not len(loaded.uses), place
    finally:
        gc.enable()

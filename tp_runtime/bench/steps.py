"""Measures the times of tokens under several arms, and compares them.

The arms are interleaved as finely as possible: every arm decodes one token, then every
arm the next token, and each token begins with another arm. If the machine slows down or speeds up during the
measurement, this affects all arms. Captured decode steps (session/cuda_graphs.py) belong to one sequence at a time, so
there every arm decodes all tokens of a round before the next arm begins, and each round begins with another arm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..errors import RequestError
from ..generation import Sampler, generate
from .arms import Arm

_SETTLE_MS, _LONGEST_SETTLE = 5, 500  # the interval between checks and the longest wait, in milliseconds


@dataclass
class Times:
    """The times of one arm, in seconds, with one value for each round.

    Attributes:
        first: the times of the first token.
        token: the medians of the times of the further tokens. A median, because a step that another process delayed
            shows nothing about the patch.
    """

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


def interleaved(
    arms: Sequence[Arm], tokens: int, rounds: int, after_round: Callable[[int], object] = lambda number: None
) -> list[Times]:
    """Measure the times of every arm, after one round to warm up.

    Args:
        arms: the arms to compare.
        tokens: the number of tokens to decode in a round, after the first token.
        rounds: the number of measured rounds.
        after_round: a function that is called after each round with the round's number; round 0 is the warm-up.

    Raises:
        RequestError: an arm's prompt and completion do not fit its context window.
    """
    for arm in arms:
        skipped = 0 if arm.patch is None or arm.patch.prefix is None else arm.patch.prefix.skipped
        window = arm.graph.folder.context_window
        if (needed := len(arm.prompt) + max(0, skipped) + tokens) >= window:
            raise RequestError(
                "prompt and completion do not fit the context window",
                field="prompt_tokens + tokens",
                got=needed,
                wanted=f"below {window}",
            )
    times = [Times() for _ in arms]
    for number in range(rounds + 1):
        measured = one_round(arms, tokens, number)
        if number > 0:
            for kept, steps in zip(times, measured, strict=True):
                kept.first.append(steps[0])
                kept.token.append(median(steps[1:]))
        after_round(number)
    return times


def one_round(arms: Sequence[Arm], tokens: int, first: int) -> list[list[float]]:
    """Measure one round.

    Args:
        arms: the arms to compare.
        tokens: the number of tokens to decode, after the first token.
        first: the index of the arm that decodes the first token first. Each further token begins with the next arm.

    Returns:
        For each arm the seconds of the first token and of `tokens` more.
    """
    order = [(first + offset) % len(arms) for offset in range(len(arms))]
    if any(arm.graph.captured is not None for arm in arms):
        answers = {arm: _answer_seconds(arms[arm], tokens) for arm in order}
        return [answers[arm] for arm in range(len(arms))]
    runs = [_answer(arm, tokens) for arm in arms]
    several = len({id(arm.graph) for arm in arms}) > 1
    seconds: list[list[float]] = [[] for _ in arms]
    for step in range(tokens + 1):
        for arm in order[step % len(arms) :] + order[: step % len(arms)]:
            if several:
                _settle()
            start = time.perf_counter()
            next(runs[arm])
            seconds[arm].append(time.perf_counter() - start)
    return seconds


def _answer(arm: Arm, tokens: int) -> Iterator[int]:
    return generate(arm.graph, arm.prompt, arm.bound, sampler=Sampler(), max_new_tokens=tokens + 1, eos_ids=frozenset())


def _answer_seconds(arm: Arm, tokens: int) -> list[float]:
    """Return the seconds of the first token of an answer and of `tokens` more."""
    run, seconds = _answer(arm, tokens), []
    for _ in range(tokens + 1):
        start = time.perf_counter()
        next(run)
        seconds.append(time.perf_counter() - start)
    return seconds


def python_seconds(arm: Arm, tokens: int) -> list[float]:
    """Measure the seconds of each decoded token outside ONNX Runtime's run: binding, sampling and bookkeeping.

    A small model gives smaller values, because its runs do not evict Python's data from the processor's caches. Measure
    on the real model.

    Args:
        arm: the arm to run.
        tokens: the number of tokens to decode.

    Returns:
        The seconds of each token.
    """
    graph, timed = arm.graph, _TimedSession(arm.graph.session)
    holders: list[Any] = [graph] if graph.captured is None else [graph, graph.captured]
    run, seconds = _answer(arm, tokens), []
    next(run)
    for holder in holders:
        holder.session = timed
    try:
        for _ in range(tokens):
            timed.seconds, start = 0.0, time.perf_counter()
            next(run)
            seconds.append(time.perf_counter() - start - timed.seconds)
    finally:
        for holder in holders:
            holder.session = timed.session
    return seconds


class _TimedSession:
    """A session that records how long its runs take."""

    def __init__(self, session: Any) -> None:
        self.session, self.seconds = session, 0.0

    def run_with_iobinding(self, binding: Any, *options: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(binding, *options)
        self.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def _settle() -> None:
    """Wait until no thread of this process is busy.

    The threads of an ONNX Runtime session spin for about 50 ms after a run, on the cores on which the next run of
    another session is measured.
    """
    for _ in range(_LONGEST_SETTLE // _SETTLE_MS):
        busy = time.process_time()
        time.sleep(_SETTLE_MS / 1e3)
        if time.process_time() - busy < 0.2 * _SETTLE_MS / 1e3:
            return


def compare(arms: Sequence[Arm], times: Sequence[Times]) -> list[dict[str, Any]]:
    """Return a row for each arm, with medians in milliseconds and ratios to the first arm.

    `ratio` is the ratio of the medians. `ratio_per_round` is the median of the ratios of the rounds.
    """
    rows = []
    for arm, arm_times in zip(arms, times, strict=True):
        row: dict[str, Any] = {
            "label": arm.label,
            "precision": arm.graph.folder.precision,
            "patch": None if arm.patch is None else arm.patch.name,
            "patch_rank": None if arm.patch is None else arm.patch.rank,
            "patch_slots": 0 if arm.patch is None else len(arm.patch.deltas),
            "patch_inputs": len(arm.bound.values),
        }
        for name in ("first", "token"):
            own, base = getattr(arm_times, name), getattr(times[0], name)
            row[f"{name}_ms"] = 1e3 * median(own)
            row[f"{name}_ratio"] = median(own) / median(base)
            row[f"{name}_ratio_per_round"] = median(one / other for one, other in zip(own, base, strict=True))
        rows.append(row)
    return rows

"""This module measures what patches cost. It prints nothing; cli/bench.py reads the command line and prints.

The variants that are compared (the arms) are interleaved as finely as possible: every arm decodes one token, then every
arm the next token, and each token begins with another arm. If the machine slows down or speeds up during the
measurement, this affects all arms. Captured decode steps (session/cuda_graphs.py) belong to one sequence at a time, so
there every arm decodes all tokens of a round before the next arm begins, and each round begins with another arm.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .errors import PatchTargetError, RequestError
from .generation import Sampler, generate
from .model import PatchedModel
from .patch import Delta, Patch, PatchConfig
from .session import BoundPatch, Graph, ModelFolder
from .storage import temporary_folder

RANK = 16
_SWITCHES = 200
_SETTLE_MS, _LONGEST_SETTLE = 5, 500  # the interval between checks and the longest wait, in milliseconds


@dataclass(frozen=True, eq=False)
class Arm:
    """One of the variants that are compared.

    Attributes:
        label: the name of the arm.
        graph: the graph that runs.
        bound: the bound patch that it runs under.
        prompt: the ids of its prompt.
        patch: the patch that `bound` was made from; None for the base.
    """

    label: str
    graph: Graph
    bound: BoundPatch
    prompt: list[int]
    patch: Patch | None = None


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


# -- arms ------------------------------------------------------------------------------------------------------


def base_arm(label: str, graph: Graph, length: int, like: Patch | None = None) -> Arm:
    """Return the arm of the base model. If `like` is given, the arm has the same prompt as this patch's arm."""
    return Arm(label, graph, graph.base, _prompt(graph.folder, length, like))


def patch_arm(label: str, model: PatchedModel, patch: Patch, length: int) -> Arm:
    """Return the arm of a patch, after a check that the patch has an effect.

    Raises:
        PatchTargetError: the patch changes no logit, so there is nothing to measure.
        PatchError: the patch does not fit.
    """
    graph = model.graph
    prompt = _prompt(graph.folder, length, patch)
    start = prompt[: len(_lead(patch)) + 1]
    if np.array_equal(model.logits(start, None)[-1], model.logits(start, patch)[-1]):
        raise PatchTargetError(
            "the patch changes nothing, so there is nothing to measure", field="patch", got=patch.name
        )
    return Arm(label, graph, graph.bind(patch), prompt, patch)


def random_patch(folder: ModelFolder, rank: int = RANK, seed: int = 0) -> Patch:
    """Return a random patch in every slot. It is as fast as any patch of its rank; the text under it is noise."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return (0.01 * rng.standard_normal(shape, np.float32)).astype(np.float32)

    deltas = {
        key: Delta(normal(slot.inputs, rank), normal(rank, slot.outputs), normal(slot.outputs))
        for key, slot in folder.slots.items()
    }
    config = PatchConfig(
        name="random",
        method="matrix",
        base_model=folder.base_model,
        base_digest=folder.base_digest,
        architecture=folder.architecture,
        precision=folder.precision,
        context_digest="",
    )
    return Patch(deltas, config)


def _lead(patch: Patch | None) -> list[int]:
    return [] if patch is None or patch.prefix is None else list(patch.prefix.replaces)


def _prompt(folder: ModelFolder, length: int, patch: Patch | None) -> list[int]:
    """Return `length` random ids, after the ids that the patch's KV prefix replaces."""
    return _lead(patch) + np.random.default_rng(0).integers(0, folder.vocab_size, length).tolist()


# -- tokens ----------------------------------------------------------------------------------------------------


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


# -- loading and switching -------------------------------------------------------------------------------------


def load_seconds(model: PatchedModel, file: Path) -> float:
    """Measure the seconds from the file to a patch that requests can select: it is read, checked and on the device."""
    start = time.perf_counter()
    name = model.load_patch(file, "bench")
    seconds = time.perf_counter() - start
    model.unload_patch(name)
    return seconds


def switch_seconds(model: PatchedModel, names: Sequence[str], token: int = 0, *, converted: bool = True) -> list[float]:
    """Measure switches between loaded patches: from the request for another patch until its tensors are bound.

    The loop over bind_ortvalue_input is the one that the first step of a new cache runs.

    Args:
        model: the model.
        names: the names of the loaded patches to switch between, one after the other.
        token: the id that is run once before the switches.
        converted: whether every patch is converted to the slots' dtype before the switch to it, as one that ran lately
            is. If not, the switch converts it.

    Returns:
        The seconds of each switch.
    """
    graph, patches = model.graph, model.patches
    bounds = [graph.bind(patches[name]) for name in names]
    cache = graph.new_cache(bounds[0])
    graph.forward([token], cache, bounds[0])
    cache.values = None  # it runs no more, so its patch needs no tensors
    values: Mapping[str, Any] | None
    seconds = []
    for number in range(1, _SWITCHES + 1):
        target = number % len(names)
        values = None  # the patch before is let go, so that with one name there is something to convert
        kept = bounds[target].values if converted else None  # it stays converted, however small the store is
        if not converted:
            graph.release(bounds[target])
        start = time.perf_counter()
        model.new_cache(names[target])
        values = bounds[target].values
        for name, value in values.items():
            cache.binding.bind_ortvalue_input(name, value)
        seconds.append(time.perf_counter() - start)
    del kept
    return seconds


def first_step_seconds(graph: Graph, token: int, bounds: tuple[BoundPatch, BoundPatch]) -> float:
    """Measure one token under the second patch, directly after one under the first.

    The seconds include the switch, the buffers of a new cache, and the step.
    """
    before, after = bounds
    graph.forward([token], graph.new_cache(before), before)
    start = time.perf_counter()
    graph.forward([token], graph.new_cache(after), after)
    return time.perf_counter() - start


def resident(model: PatchedModel, counts: Sequence[int], rank: int = RANK) -> list[dict[str, Any]]:
    """Measure what many loaded patches cost: their memory, and the switch from one to the next.

    Args:
        model: the model. Afterwards it has the same loaded patches as before.
        counts: the numbers of patches to load, each at least 1.
        rank: the rank of the patches, which are random and all different, in files of half precision.

    Returns:
        A row for each count in ascending order, with `patches` (the count), `rank`, `patch_bytes` (the size of one
        file), `files_bytes` (that of all files), `converted_bytes` (the bytes of converted patches that the session
        keeps), `switch_ms` (to a patch that is converted), `convert_ms` (to one that is not), and `anonymous_bytes`:
        the growth of the process's own memory, or None if the system does not report it.
    """
    names: list[str] = []
    rows: list[dict[str, Any]] = []
    files_bytes = 0
    gc.collect()
    _give_back_free_memory()
    before = memory_bytes("RssAnon")
    try:
        for count in sorted(set(counts)):
            while len(names) < count:
                with temporary_folder(prefix="tp-bench-") as folder:
                    file = folder / "random.safetensors"
                    random_patch(model.graph.folder, rank, seed=len(names)).save(file)
                    files_bytes += file.stat().st_size
                    names.append(model.load_patch(file, f"bench-{len(names)}"))
            gc.collect()
            _give_back_free_memory()
            now = memory_bytes("RssAnon")
            row: dict[str, Any] = {
                "patches": count,
                "rank": rank,
                "patch_bytes": files_bytes // count,
                "files_bytes": files_bytes,
                "converted_bytes": model.graph.bound_values.nbytes,
                "anonymous_bytes": None if before is None or now is None else now - before,
            }
            rows.append(row)
        # The switches come after all memory readings, because measuring them needs memory too. With a count of 1 the
        # patch is switched to itself.
        for row in rows:
            switched = names[: row["patches"]]
            row["convert_ms"] = 1e3 * median(switch_seconds(model, switched, converted=False))
            row["switch_ms"] = 1e3 * median(switch_seconds(model, switched))
    finally:
        for name in names:
            model.unload_patch(name)
    return rows


def _give_back_free_memory() -> None:
    """Return freed memory to the system, because new patches would fill it first and hide the growth.

    This works with glibc and does nothing elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_bytes(field: str) -> int | None:
    """Return the bytes that /proc/self/status reports for this process, or None if the system does not report them.

    Args:
        field: the name of the field. `VmRSS` is the resident memory, `RssAnon` the part of it that no file backs, and
            `VmHWM` the peak of the resident memory.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])

"""Measuring what patches cost. Prints nothing and reads no command line: that is cli/bench.py.

What is compared is interleaved as finely as it can be: a token of each arm in turn, and the next token beginning with
another arm. So a machine that slows down or speeds up meanwhile does it to all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .errors import PatchTargetError, RequestError
from .generation import Sampling, generate
from .model import PatchedModel
from .patch import Delta, Patch, PatchConfig
from .session import BoundPatch, Graph, ModelFolder

RANK = 16
_SWITCHES = 200
_SETTLE_MS, _LONGEST_SETTLE = 5, 500  # milliseconds


@dataclass(frozen=True, eq=False)
class Arm:
    """One of the things compared.

    Attributes:
        label: names it.
        graph: what runs.
        bound: the patch it runs under.
        prompt: its ids.
        patch: what is bound; None for the base.
    """

    label: str
    graph: Graph
    bound: BoundPatch
    prompt: list[int]
    patch: Patch | None = None


@dataclass
class Times:
    """Of one arm, in seconds, a value for each round: the first token, and the median of the further ones.

    The median: a step that another process delayed says nothing of the patch.
    """

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


# -- arms ------------------------------------------------------------------------------------------------------


def base_arm(label: str, graph: Graph, length: int, like: Patch | None = None) -> Arm:
    """The base model; `like` is a patch whose own prompts it is to be compared on."""
    return Arm(label, graph, graph.base, _prompt(graph.folder, length, like))


def patch_arm(label: str, model: PatchedModel, patch: Patch, length: int) -> Arm:
    """A patch, once it is known to do something.

    Raises:
        PatchTargetError: it changes no logit: there is nothing to measure.
        PatchError: it does not fit.
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
    """A patch in every slot: its speed is that of any patch of its rank, its text is noise."""
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
    """Random ids; before them those that a patch's KV prefix stands in for."""
    return _lead(patch) + np.random.default_rng(0).integers(0, folder.vocab_size, length).tolist()


# -- tokens ----------------------------------------------------------------------------------------------------


def interleaved(
    arms: Sequence[Arm], tokens: int, rounds: int, after_round: Callable[[int], object] = lambda number: None
) -> list[Times]:
    """Times of every arm, after one round to warm up.

    Args:
        arms: what to compare.
        tokens: decoded in a round, after the first.
        rounds: that count.
        after_round: called with the number of each round; round 0 warms up.

    Raises:
        RequestError: prompt and completion do not fit a context window.
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
    """Seconds of the first token and `tokens` more of every arm; turns begin with arm `first`, then the next."""
    runs = [
        generate(arm.graph, arm.prompt, arm.bound, sampling=Sampling(), max_new_tokens=tokens + 1, eos_ids=frozenset())
        for arm in arms
    ]
    several = len({id(arm.graph) for arm in arms}) > 1
    seconds: list[list[float]] = [[] for _ in arms]
    for step in range(tokens + 1):
        for turn in range(len(arms)):
            arm = (first + step + turn) % len(arms)
            if several:
                _settle()
            start = time.perf_counter()
            next(runs[arm])
            seconds[arm].append(time.perf_counter() - start)
    return seconds


def python_seconds(arm: Arm, tokens: int) -> list[float]:
    """Of each of `tokens` decoded ones, what was not spent inside ONNX Runtime: binding, sampling, bookkeeping.

    It is less on a small model than beside a run that has swept the processor's caches: measure it on the real one.
    """
    graph, timed = arm.graph, _TimedSession(arm.graph.session)
    run = generate(graph, arm.prompt, arm.bound, sampling=Sampling(), max_new_tokens=tokens + 1, eos_ids=frozenset())
    next(run)
    seconds = []
    graph.session = timed
    try:
        for _ in range(tokens):
            timed.seconds, start = 0.0, time.perf_counter()
            next(run)
            seconds.append(time.perf_counter() - start - timed.seconds)
    finally:
        graph.session = timed.session
    return seconds


class _TimedSession:
    """A session that keeps how long its runs took."""

    def __init__(self, session: Any) -> None:
        self.session, self.seconds = session, 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def _settle() -> None:
    """Wait until no thread of this process is busy.

    The threads of an ONNX Runtime session spin for some 50 ms after a run, on the cores that another session's next
    run is measured on.
    """
    for _ in range(_LONGEST_SETTLE // _SETTLE_MS):
        busy = time.process_time()
        time.sleep(_SETTLE_MS / 1e3)
        if time.process_time() - busy < 0.2 * _SETTLE_MS / 1e3:
            return


def compare(arms: Sequence[Arm], times: Sequence[Times]) -> list[dict[str, Any]]:
    """A row for each arm: medians in milliseconds, and ratios to the first arm.

    `ratio` is that of the medians; `ratio_per_round` the median of each round's ratio.
    """
    rows = []
    for arm, its in zip(arms, times, strict=True):
        row: dict[str, Any] = {
            "label": arm.label,
            "precision": arm.graph.folder.precision,
            "patch": None if arm.patch is None else arm.patch.name,
            "patch_rank": None if arm.patch is None else arm.patch.rank,
            "patch_slots": 0 if arm.patch is None else len(arm.patch.deltas),
            "patch_inputs": len(arm.bound.values),
        }
        for name in ("first", "token"):
            mine, base = getattr(its, name), getattr(times[0], name)
            row[f"{name}_ms"] = 1e3 * median(mine)
            row[f"{name}_ratio"] = median(mine) / median(base)
            row[f"{name}_ratio_per_round"] = median(one / other for one, other in zip(mine, base, strict=True))
        rows.append(row)
    return rows


# -- loading and switching -------------------------------------------------------------------------------------


def load_seconds(model: PatchedModel, file: Path) -> float:
    """From the file to a patch that can be switched on: read, checked, on the device."""
    start = time.perf_counter()
    name = model.load_patch(file, "bench")
    seconds = time.perf_counter() - start
    model.unload_patch(name)
    return seconds


def switch_seconds(model: PatchedModel, names: Sequence[str], token: int = 0) -> list[float]:
    """From asking for another loaded patch to its tensors bound in a live binding, many times, through all `names`.

    The loop over bind_ortvalue_input is the one that the first step of a new cache goes through.
    """
    graph, patches = model.graph, model.patches
    bounds = [graph.bind(patches[name]) for name in names]
    cache = graph.new_cache(bounds[0])
    graph.forward([token], cache, bounds[0])
    seconds = []
    for turn in range(1, _SWITCHES + 1):
        to = turn % len(names)
        start = time.perf_counter()
        model.new_cache(names[to])
        for name, value in bounds[to].values.items():
            cache.binding.bind_ortvalue_input(name, value)
        seconds.append(time.perf_counter() - start)
    return seconds


def first_step_seconds(graph: Graph, token: int, bounds: tuple[BoundPatch, BoundPatch]) -> float:
    """One token under the second right after one under the first: the switch, a new cache's buffers, and the step."""
    before, after = bounds
    graph.forward([token], graph.new_cache(before), before)
    start = time.perf_counter()
    graph.forward([token], graph.new_cache(after), after)
    return time.perf_counter() - start


def resident(model: PatchedModel, counts: Sequence[int], rank: int = RANK) -> list[dict[str, Any]]:
    """What it costs to have many patches loaded: memory, and the switch from one to the next.

    Args:
        model: left with the patches it had.
        counts: of patches, each at least 1.
        rank: of the patches, which are random and all different.

    Returns:
        For each count in ascending order: `patches`, `switch_ms`, and the growth of the process' own memory,
        `anonymous_bytes`, which is None where the system does not tell.
    """
    names: list[str] = []
    rows: list[dict[str, Any]] = []
    gc.collect()
    _give_back_free_memory()
    before = memory_bytes("RssAnon")
    try:
        for count in sorted(set(counts)):
            while len(names) < count:
                made = random_patch(model.graph.folder, rank, seed=len(names))
                names.append(model.load_patch(made, f"bench-{len(names)}"))
            now = memory_bytes("RssAnon")
            grown = None if before is None or now is None else now - before
            rows.append({"patches": count, "rank": rank, "patch_bytes": made.nbytes, "anonymous_bytes": grown})
        # Afterwards: measuring the switch takes memory of its own. One patch alone is switched to itself.
        for row in rows:
            row["switch_ms"] = 1e3 * median(switch_seconds(model, names[: row["patches"]]))
    finally:
        for name in names:
            model.unload_patch(name)
    return rows


def _give_back_free_memory() -> None:
    """What earlier work freed would otherwise be filled first, and hide the growth. With glibc; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_bytes(field: str) -> int | None:
    """Memory of this process as Linux counts it, by its name in /proc/self/status; None where the system does not tell.

    `RssAnon` is what no file backs of the resident memory, `VmRSS` all of it, `VmHWM` its peak.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])

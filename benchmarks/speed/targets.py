"""The targets of the project and the figures that it reaches, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.speed.plots import rank_ratios

Run = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure of a run.

    Attributes:
        name: the name of the figure in the table.
        wanted: the bound.
        least: whether the bound is the least value that meets the target. Otherwise it is the greatest.
        measure: the function that returns the figure of a run. If the run lacks the data, it returns None or raises
            KeyError.
        why: the reason why the target is missed, as whole sentences.
    """

    name: str
    wanted: float
    least: bool
    measure: Callable[[Run], float | None]
    why: str = ""

    def of(self, run: Run) -> float | None:
        """Return the figure, or None if it was not measured."""
        try:
            return self.measure(run)
        except (KeyError, IndexError, ZeroDivisionError, ValueError):
            return None

    def met(self, value: float) -> bool:
        """Return whether a figure meets the bound."""
        return value >= self.wanted if self.least else value <= self.wanted


def ratio(run: Run, what: str, one: str, other: str, length: int = 128) -> float:
    """Return how much longer one runtime takes than another after a context, as the median of each round's ratio.

    A machine that slows down from round to round shifts the median of each runtime. The two times that a round compares
    are minutes apart at most.

    Args:
        run: one run of the measurements.
        what: the time to compare, `first` or `token`.
        one: the key of the runtime whose time is the numerator.
        other: the key of the runtime whose time is the denominator.
        length: the length of the context in tokens.
    """
    samples = (run["rivals"][key]["samples"][what][f"prompt-{length}"] for key in (one, other))
    return median(a / b for a, b in zip(*samples, strict=True))


def _decode(rival: str, ours: str) -> Callable[[Run], float]:
    return lambda run: ratio(run, "token", rival, ours)


def _prefill(bits: str, llama: str) -> Callable[[Run], float]:
    return lambda run: min(ratio(run, "first", rival, f"ours-{bits}") for rival in (f"genai-{bits}", llama))


def _cold_ratio(bits: str) -> Callable[[Run], float]:
    def of(run: Run) -> float:
        ours, genai = (run["rivals"][key]["samples"]["cold_start"] for key in (f"ours-{bits}", f"genai-{bits}"))
        return median(a / b for a, b in zip(ours, genai, strict=True))

    return of


def _rank(bits: str) -> Callable[[Run], float]:
    return lambda run: dict(rank_ratios(run["patches"][bits]))[16]


def _switch(run: Run) -> float:
    return max(float(row["switch_ms"]) for bench in run["patches"].values() for row in bench["resident"])


def _python(run: Run) -> float:
    return max(float(bench["python_ms"]) for bench in run["patches"].values())


def _resident(run: Run) -> float:
    (row,) = (row for row in run["patches"]["fp32"]["resident"] if row["patches"] == 100)
    return float(row["anonymous_bytes"]) / (row["files_bytes"] + row["converted_bytes"])


def _first_under_patch(run: Run) -> float:
    return max(float(bench["first_token_ratio_per_round"]) for bench in run["patches"].values())


def _cold(run: Run) -> float:
    if not run["model"].startswith("smollm2"):
        raise KeyError("the target is one of the small model")
    return float(run["rivals"]["ours-int4"]["cold_start_s"])


def _batch(run: Run) -> float:
    sizes = [row for batch in run["batches"].values() for row in batch["sizes"] if row["rows"] == 8]
    return min(1 / float(row["ratio_per_step"]) for row in sizes)


_NOTE = """\
"A / B" is the time, memory or throughput of A divided by that of B. A ratio of two runtimes is the median over the
rounds of a run. Bold figures miss the target, and the list below the table gives the reasons."""
_HEAD = (
    "tp-runtime keeps the head at eight bits. A token therefore reads a seventh (SmolLM2) to more than half (Gemma) "
    "more bytes, and the loss is a third lower. The next row compares at equal bits."
)
_CALLS = (
    "Each layer calls three operators that have nothing to do yet. ONNX Runtime's profiler counts 2 % (Gemma) to 5 % "
    "(SmolLM2) of an int4 token for them, its own cost included. Two processes that run the same graph also differ by "
    "a few per cent in either direction, depending on where their memory lies."
)
_ELSEWHERE = (
    "- The targets of int4's quality are measured elsewhere: docs/precision.md has the figures of "
    "`benchmarks/precision.py`."
)
_LOOP = (
    "The reasons are the empty slots and Python's share of a token (rows below), and that two processes over one graph "
    "differ by a few per cent."
)
_PREFILL = (
    "Products take two thirds of the time, in blocks of 32 values. Blocks of 128 would take 0.75 of theirs, but lose "
    "more in four bits (docs/precision.md)."
)
_NOISE = "The row of rank 0 in the table of ranks, the base measured once more, shows the noise."
_LARGEST = (
    "The figure is the worst of three precisions: where weights of few bits make a step fast, the three operators of a "
    "patch in each layer are a larger part of it."
)
_ITS_GRAPH = "genai on its own graph / tp-runtime"
_WINDOWS = "with a 4-bit head and window caches"
TARGETS = (
    Target(f"int4 decode time, {_ITS_GRAPH}", 1.0, True, _decode("genai-int4", "ours-int4"), _HEAD),
    Target(
        f"int4 decode time, {_ITS_GRAPH} with a 4-bit head", 1.0, True, _decode("genai-int4", "ours-int4-head4"), _LOOP
    ),
    Target(f"int8 decode time, {_ITS_GRAPH}", 1.0, True, _decode("genai-int8", "ours-int8"), _LOOP),
    Target(f"fp32 decode time, {_ITS_GRAPH}", 1.0, True, _decode("genai-fp32", "ours-fp32"), _LOOP),
    *(
        Target(
            f"int4 {name} after {length} tokens, {_ITS_GRAPH} {_WINDOWS}",
            wanted,
            True,
            partial(ratio, what=what, one="genai-int4", other="ours-int4-head4-window", length=length),
            why,
        )
        for what, name, wanted, why in (("token", "decode time", 1.0, ""), ("first", "first token", 2.5, _PREFILL))
        for length in (2048, 8192)
    ),
    Target(
        "int4 decode time, llama.cpp on the published file / tp-runtime",
        1.3,
        True,
        _decode("llama-published", "ours-int4"),
        "tp-runtime keeps the head at eight bits. The next row has it at four.",
    ),
    Target(
        "int4 decode time, llama.cpp on the published file / tp-runtime with a 4-bit head",
        1.3,
        True,
        _decode("llama-published", "ours-int4-head4"),
        _LOOP,
    ),
    Target(
        "int4 first token after 128 tokens, the faster of genai and llama.cpp / tp-runtime",
        1.0,
        True,
        _prefill("int4", "llama-published"),
    ),
    Target("fp32 decode time, patch of rank 16 / no patch", 1.03, False, _rank("fp32"), _NOISE),
    Target("int4 decode time, patch of rank 16 / no patch", 1.05, False, _rank("int4"), _NOISE),
    Target("fp32 decode time, empty slots / no slots", 1.01, False, _decode("ours-fp32", "slots-none-fp32"), _CALLS),
    Target("int4 decode time, empty slots / no slots", 1.01, False, _decode("ours-int4", "slots-none-int4"), _CALLS),
    Target(
        "Python's share of a token, ms",
        0.12,
        False,
        _python,
        "The graph's run evicts Python's data from the processor's caches. The same lines take less time with a "
        "smaller model.",
    ),
    Target("switch to another patch, ms", 0.3, False, _switch),
    Target("first token, with a patch / without patch and context", 1.05, False, _first_under_patch, _LARGEST),
    Target(
        "memory of 100 loaded patches / size of their files and of the converted patches that are kept",
        1.05,
        False,
        _resident,
    ),
    Target("int4 cold start, tp-runtime / genai on its own graph", 1.1, False, _cold_ratio("int4")),
    Target("int4 cold start, s", 0.5, False, _cold),
    Target("throughput of a batch of 8, a different patch in each row / base", 0.9, True, _batch, _LARGEST),
)


def section(found: dict[str, Any]) -> str:
    """Return the section of BENCHMARKS.md that reports the targets and the figures that were reached."""
    runs = found["runs"]
    head = [
        "target",
        "wanted",
        *(f"{run['model'].split('-')[0]}, {run['threads']} thread{'s' if run['threads'] > 1 else ''}" for run in runs),
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- | ---: |" + " ---: |" * len(runs)]
    missed = []
    for target in TARGETS:
        values = [target.of(run) for run in runs]
        cells = ["" if v is None else f"{v:.2f}" if target.met(v) else f"**{v:.2f}**" for v in values]
        bound = f"{'at least' if target.least else 'at most'} {target.wanted:g}"
        lines.append(f"| {target.name} | {bound} | " + " | ".join(cells) + " |")
        if target.why and any(v is not None and not target.met(v) for v in values):
            missed.append(f"- {target.name}: {target.why}")
    missed.append(_ELSEWHERE)
    parts = ["## Targets reached and missed", _NOTE, "\n".join(lines)]
    return "\n\n".join([*parts, "\n".join(missed)])

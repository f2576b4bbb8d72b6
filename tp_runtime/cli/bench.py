"""`tp-runtime bench`: what a patch costs on this machine.

All is measured in one run on one session, and what is compared is interleaved as finely as it can be: a token of the
base, then a token under the patch, then the other way round. So a machine that slows down or speeds up meanwhile does
it to both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tp_runtime import engine
from tp_runtime.delta import Delta
from tp_runtime.device import require_onnxruntime
from tp_runtime.errors import PatchTargetError, RequestError
from tp_runtime.folder import ModelFolder
from tp_runtime.graph import BoundPatch, Graph
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.patch_config import PatchConfig
from tp_runtime.sampling import Sampling

from .options import add_model_options, open_model
from .printing import note, plural, print_fields, size, version

_RANK = 16
_SWITCHES = 200
_QUIET_SECONDS = 2.0
_UNPATCHED, _PATCHED = 0, 1


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what a patch costs on this machine",
        description="Measure loading, the first token, decoding with and without a patch, and switching. Medians "
        "over the rounds, interleaved in one session.",
    )
    add_model_options(parser)
    parser.add_argument("--patch", type=Path, metavar="FILE", help=f"default: a random patch of rank {_RANK}")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="decoded in a round (default 32)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of the prompt (default 128)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="after one to warm up (default 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    for name, low in (("tokens", 2), ("prompt_tokens", 1), ("rounds", 1)):
        if getattr(args, name) < low:
            raise RequestError("too few", field=name, got=getattr(args, name), wanted=f"at least {low}")
    require_onnxruntime()  # importing it is Python's time, not the model's
    if args.patch is not None:
        Patch.load(args.patch)  # before seconds go into a model
    start = time.perf_counter()
    model = open_model(args)
    load_seconds = time.perf_counter() - start
    with _patch_file(args.patch, model.graph.folder) as file:
        report = _measure(model, file, args)
    report |= {
        "model": model.graph.folder.base_model,
        "precision": model.graph.folder.precision,
        "device": model.graph.device.kind,
        "provider": model.graph.device.provider,
        "threads": args.threads,
        "cpu_count": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("tp-runtime", "numpy")}
        | {"onnxruntime": require_onnxruntime().__version__, "python": platform.python_version()},
        "patch_file": None if args.patch is None else str(args.patch),
        "model_load_s": load_seconds,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


# -- measuring -------------------------------------------------------------------------------------------------


@dataclass
class _Round:
    """Times in seconds, of [unpatched, patched]."""

    first: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: list[list[float]] = field(default_factory=lambda: [[], []])

    def per_token(self, arm: int) -> float:
        """The median: a step that another process delayed says nothing of the patch."""
        return median(self.steps[arm])


def _measure(model: PatchedModel, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    graph = model.graph
    patch = Patch.load(file)
    bounds = (graph.base, graph.bind(patch))
    lead = [] if patch.prefix is None else list(patch.prefix.replaces)
    prompt = lead + np.random.default_rng(0).integers(0, graph.folder.vocab_size, args.prompt_tokens).tolist()
    skipped = 0 if patch.prefix is None else patch.prefix.skipped
    if (needed := len(prompt) + max(0, skipped) + args.tokens) >= graph.folder.context_window:
        raise RequestError(
            "prompt and completion do not fit the context window",
            field="prompt_tokens + tokens",
            got=needed,
            wanted=f"below {graph.folder.context_window}",
        )
    start = prompt[: len(lead) + 1]
    if np.array_equal(model.logits(start, None)[-1], model.logits(start, patch)[-1]):
        raise PatchTargetError(
            "the patch changes nothing, so there is nothing to measure", field="patch", got=patch.name
        )
    progress = _Progress(args.rounds + 1)
    rounds, loads, first_steps = [], [], []
    for number in range(args.rounds + 1):
        measured = _round(graph, prompt, bounds, args.tokens, first=number % 2)
        load, switched = _load_seconds(model, file), _first_step_seconds(graph, prompt[-1], bounds)
        if number > 0:  # the first one warms up
            rounds.append(measured)
            loads.append(load)
            first_steps.append(switched)
        progress.step()
    switches = _switch_seconds(model, patch, prompt[-1])
    progress.end()
    first = [median(r.first[arm] for r in rounds) for arm in (_UNPATCHED, _PATCHED)]
    pace = [median(r.per_token(arm) for r in rounds) for arm in (_UNPATCHED, _PATCHED)]
    return {
        "patch": patch.name,
        "patch_rank": patch.rank,
        "patch_slots": len(patch.deltas),
        "patch_inputs": len(bounds[_PATCHED].values),
        "patch_bytes": file.stat().st_size,
        "patch_load_ms": 1e3 * median(loads),
        "first_token_ms": {"unpatched": 1e3 * first[_UNPATCHED], "patched": 1e3 * first[_PATCHED]},
        "first_token_ratio": first[_PATCHED] / first[_UNPATCHED],
        "first_token_ratio_per_round": median(r.first[_PATCHED] / r.first[_UNPATCHED] for r in rounds),
        "token_ms": {"unpatched": 1e3 * pace[_UNPATCHED], "patched": 1e3 * pace[_PATCHED]},
        "token_ratio": pace[_PATCHED] / pace[_UNPATCHED],
        "token_ratio_per_round": median(r.per_token(_PATCHED) / r.per_token(_UNPATCHED) for r in rounds),
        "switch_ms": 1e3 * median(switches),
        "switch_first_step_ms": 1e3 * median(first_steps),
    }


def _round(graph: Graph, prompt: list[int], bounds: tuple[BoundPatch, BoundPatch], tokens: int, first: int) -> _Round:
    """The first token and `tokens` more under both, in turns that begin with `first` and then change."""
    runs = [
        engine.generate(graph, prompt, bound, sampling=Sampling(), max_new_tokens=tokens + 1, eos_ids=frozenset())
        for bound in bounds
    ]
    result = _Round()
    for step in range(tokens + 1):
        for arm in (first, 1 - first) if step % 2 == 0 else (1 - first, first):
            start = time.perf_counter()
            next(runs[arm])
            seconds = time.perf_counter() - start
            if step == 0:
                result.first[arm] = seconds
            else:
                result.steps[arm].append(seconds)
    return result


def _load_seconds(model: PatchedModel, file: Path) -> float:
    """From the file to a patch that can be switched on: read, checked, on the device."""
    start = time.perf_counter()
    name = model.load_patch(file, "bench")
    seconds = time.perf_counter() - start
    model.unload_patch(name)
    return seconds


def _switch_seconds(model: PatchedModel, patch: Patch, token: int) -> list[float]:
    """From asking for another loaded patch to its tensors bound in a live binding, many times back and forth.

    The loop over bind_ortvalue_input is the one that the first step of a new cache goes through.
    """
    graph = model.graph
    other = -1.0 * patch if patch.prefix is None else 0.0 * patch  # a KV prefix has no other strengths
    names = (model.load_patch(patch, "bench-1"), model.load_patch(other, "bench-2"))
    bounds = (graph.bind(patch), graph.bind(other))
    cache = graph.new_cache(bounds[0])
    graph.forward([token], cache, bounds[0])
    seconds = []
    try:
        for turn in range(_SWITCHES):
            to = (turn + 1) % 2
            start = time.perf_counter()
            model.new_cache(names[to])
            for name, value in bounds[to].values.items():
                cache.binding.bind_ortvalue_input(name, value)
            seconds.append(time.perf_counter() - start)
    finally:
        for name in names:
            model.unload_patch(name)
    return seconds


def _first_step_seconds(graph: Graph, token: int, bounds: tuple[BoundPatch, BoundPatch]) -> float:
    """One token under the patch right after one under the base: the switch, a new cache's buffers, and the step."""
    graph.forward([token], graph.new_cache(bounds[_UNPATCHED]), bounds[_UNPATCHED])
    start = time.perf_counter()
    graph.forward([token], graph.new_cache(bounds[_PATCHED]), bounds[_PATCHED])
    return time.perf_counter() - start


class _Progress:
    """On a terminal a line on stderr that counts the rounds; elsewhere one line, once it takes longer than 2 s."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.perf_counter()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._show("")

    def step(self) -> None:
        """One round is over."""
        self._done += 1
        seconds = time.perf_counter() - self._start
        left = seconds / self._done * (self._total - self._done)
        self._show(f", {left:.0f} s left")
        if self._done == 1 and not self._terminal and seconds + left > _QUIET_SECONDS:
            note(f"measuring: {plural(self._total, 'round')}, about {seconds + left:.0f} s")

    def end(self) -> None:
        """Clears the line."""
        if self._terminal:
            print(f"\r{'':<40}\r", end="", file=sys.stderr, flush=True)

    def _show(self, left: str) -> None:
        if self._terminal and self._done < self._total:
            line = f"round {self._done + 1} of {self._total}{left}"
            print(f"\r{line:<40}", end="", file=sys.stderr, flush=True)


# -- the patch -------------------------------------------------------------------------------------------------


@contextmanager
def _patch_file(file: Path | None, folder: ModelFolder) -> Iterator[Path]:
    """The file to measure; without one, a random patch is written for the time being."""
    if file is not None:
        yield file
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "random.safetensors"
        _random_patch(folder).save(made)
        yield made


def _random_patch(folder: ModelFolder) -> Patch:
    """A patch in every slot: its speed is that of any patch of its rank, its text is noise."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (0.01 * rng.standard_normal(shape)).astype(np.float32)

    deltas = {
        key: Delta(normal(slot.inputs, _RANK), normal(_RANK, slot.outputs), normal(slot.outputs))
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


# -- for people ------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    patch = f"{report['patch']}, rank {report['patch_rank']} in {plural(report['patch_slots'], 'slot')}"
    if report["patch_file"] is None:
        patch += " (made for this run; --patch FILE measures yours)"
    threads = "as many threads as there are cores" if report["threads"] is None else plural(report["threads"], "thread")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print_fields(
        [
            ("model", f"{report['model']} {report['precision']}, loaded in {report['model_load_s']:.2f} s"),
            ("device", f"{report['device']} ({report['provider']}), {threads}, {report['cpu_count']} CPUs"),
            ("patch", patch),
            ("versions", versions),
        ]
    )
    print(f"\n{'':<20}{'base':>12}{'patched':>12}{'ratio':>9}{'per round':>11}")
    for key, label in (("first_token", "first token"), ("token", "each further token")):
        times = report[f"{key}_ms"]
        ratios = f"{report[f'{key}_ratio']:>9.3f}{report[f'{key}_ratio_per_round']:>11.3f}"
        print(f"{label:<20}{times['unpatched']:>9.2f} ms{times['patched']:>9.2f} ms{ratios}")
    print()
    print_fields(
        [
            ("load a patch", f"{report['patch_load_ms']:.2f} ms from a file of {size(report['patch_bytes'])}"),
            ("switch", f"{report['switch_ms']:.3f} ms to another loaded patch ({report['patch_inputs']} inputs bound)"),
            ("switch and step", f"{report['switch_first_step_ms']:.2f} ms with a new cache and one token run"),
        ]
    )
    print(
        f"\nmedians of {plural(report['rounds'], 'round')}: a prompt of {plural(report['prompt_tokens'], 'token')}, "
        f"then {report['tokens']} more; ratio: of the medians; per round: median of each round's ratio"
    )

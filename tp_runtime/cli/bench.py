"""`tp-runtime bench` measures what a patch costs on this machine.

Everything is measured in one run, and the compared variants are interleaved token by token (tp_runtime/bench/steps.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from .. import bench
from ..errors import RequestError, printable
from ..model import PatchedModel
from ..patch import Patch
from ..session import ModelFolder, require_onnxruntime
from ..storage import Kind, atomic_file, check_output_file, parse_json_object, temporary_folder
from .options import add_model_options, open_model, session_options
from .printing import note, plural, print_fields, size, version

_QUIET_SECONDS = 2.0


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what a patch costs on this machine",
        description="Measure the time to load a patch, the time of the first token and of further tokens with and "
        "without patches, and the time to switch patches. The results are medians over the rounds. The compared "
        "variants are interleaved token by token.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--patch",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"measure this patch; may be repeated (default: a random patch of rank {bench.RANK})",
    )
    parser.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="compare MODEL with this exported folder, such as one with another precision, other slots or another "
        "route; it runs with the same patches; may be repeated",
    )
    parser.add_argument(
        "--ranks",
        default="",
        metavar="R,...",
        help="also measure random patches of these ranks; 0 measures the base model again",
    )
    parser.add_argument(
        "--resident",
        default="",
        metavar="N,...",
        help="also measure memory and switching with these numbers of random patches loaded",
    )
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="the number of tokens to decode in each round (default 32)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="the number of tokens of the prompt (default 128)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="the number of measured rounds, after one warm-up round (default 7)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="also write the JSON object to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the results."""
    for name, low in (("tokens", 2), ("prompt_tokens", 1), ("rounds", 1)):
        if getattr(args, name) < low:
            raise RequestError("the number is too small", field=name, got=getattr(args, name), wanted=f"at least {low}")
    ranks, counts = _numbers("ranks", args.ranks, low=0), _numbers("resident", args.resident, low=1)
    if args.out is not None:  # before the minutes of work
        check_output_file(args.out, _BENCH_FILE, args.patch)
    require_onnxruntime()  # before the clock starts, because the import does not belong to the model's load time
    for file in args.patch:
        Patch.load(file)  # a damaged file raises here, before the model takes seconds to load
    for folder in args.against:
        ModelFolder.open(folder)
    start = time.perf_counter()
    model = open_model(args)
    load_seconds = time.perf_counter() - start
    others = [PatchedModel.from_pretrained(folder, args.device, **session_options(args)) for folder in args.against]
    resident = bench.resident(model, counts)  # this comes first, because later measurements allocate and free memory
    with _patch_files(args.patch, model.graph.folder) as files:
        report = _measure(model, others, files, ranks, args)
    report |= {
        "resident": resident,
        "model": model.graph.folder.base_model,
        "precision": model.graph.folder.precision,
        "against": [str(folder) for folder in args.against],
        "device": model.graph.device.kind,
        "provider": model.graph.device.provider,
        "threads": args.threads,
        "cuda_graphs": args.cuda_graphs,
        "cpu_count": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("tp-runtime", "numpy")}
        | {"onnxruntime": require_onnxruntime().__version__, "python": platform.python_version()},
        "patch_file": str(args.patch[0]) if args.patch else None,
        "model_load_s": load_seconds,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "rounds": args.rounds,
    }
    if args.out is not None:
        with atomic_file(args.out, _BENCH_FILE, args.patch) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def _no_bench_file(file: Path) -> str | None:
    report = parse_json_object(file.read_bytes())
    return None if {"arms", "rounds", "prompt_tokens", "versions"} <= report.keys() else "another JSON object"


_BENCH_FILE = Kind("a file that tp-runtime bench wrote", _no_bench_file)


def _numbers(name: str, text: str, low: int) -> list[int]:
    """Parse whole numbers that are separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [low - 1]
    if any(number < low for number in numbers):
        raise RequestError(
            "the value is not a list of numbers", field=name, got=repr(text), wanted=f"such as {low},4,16"
        )
    return numbers


# -- measuring -------------------------------------------------------------------------------------------------


def _measure(
    model: PatchedModel, others: list[PatchedModel], files: list[Path], ranks: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    length, graph = args.prompt_tokens, model.graph
    patches = [Patch.load(file) for file in files]
    arms = [bench.base_arm("base", graph, length, patches[0])]
    arms += [bench.patch_arm(patch.name, model, patch, length) for patch in patches]
    for rank in ranks:
        arms.append(
            bench.patch_arm(f"random, rank {rank}", model, bench.random_patch(graph.folder, rank), length)
            if rank
            else bench.base_arm("base again", graph, length)
        )
    for folder, other in zip(args.against, others, strict=True):
        name = folder.name or str(folder)
        arms.append(bench.base_arm(f"{name}: base", other.graph, length, patches[0]))
        if other.graph.folder.slots:
            theirs = patches if args.patch else [bench.random_patch(other.graph.folder)]
            arms += [bench.patch_arm(f"{name}: {patch.name}", other, patch, length) for patch in theirs]
    loads: list[list[float]] = [[] for _ in files]
    first_steps = []
    progress = _Progress(args.rounds + 1)

    def after_round(number: int) -> None:
        load = [bench.load_seconds(model, file) for file in files]
        step = bench.first_step_seconds(graph, arms[1].prompt[-1], (arms[0].bound, arms[1].bound))
        if number > 0:  # the first round warms up
            first_steps.append(step)
            for kept, seconds in zip(loads, load, strict=True):
                kept.append(seconds)
        progress.step()

    rows = bench.compare(arms, bench.interleaved(arms, args.tokens, args.rounds, after_round))
    progress.end()
    for row, file, seconds in zip(rows[1:], files, loads, strict=False):
        row |= {"patch_bytes": file.stat().st_size, "patch_load_ms": 1e3 * median(seconds)}
    base, patched = rows[0], rows[1]
    report = {key: patched[key] for key in patched if key.startswith("patch")}
    for key, name in (("first_token", "first"), ("token", "token")):
        report[f"{key}_ms"] = {"unpatched": base[f"{name}_ms"], "patched": patched[f"{name}_ms"]}
        report[f"{key}_ratio"] = patched[f"{name}_ratio"]
        report[f"{key}_ratio_per_round"] = patched[f"{name}_ratio_per_round"]
    report["switch_ms"] = 1e3 * median(_switch_seconds(model, patches[0], arms[1].prompt[-1]))
    report["python_ms"] = 1e3 * median(bench.python_seconds(arms[1], args.tokens))
    report["switch_first_step_ms"] = 1e3 * median(first_steps)
    report["arms"] = rows
    return report


def _switch_seconds(model: PatchedModel, patch: Patch, token: int) -> list[float]:
    """Measure switches between the patch and a second patch with the same tensors."""
    other = -1.0 * patch if patch.prefix is None else 0.0 * patch  # with a KV prefix only 0 and 1 are allowed
    names = [model.load_patch(patch, "bench-1"), model.load_patch(other, "bench-2")]
    try:
        return bench.switch_seconds(model, names, token)
    finally:
        for name in names:
            model.unload_patch(name)


@contextmanager
def _patch_files(files: list[Path], folder: ModelFolder) -> Iterator[list[Path]]:
    """Provide the files to measure. If there are none, write a random patch to a temporary file."""
    if files:
        yield files
        return
    with temporary_folder(prefix="tp-bench-") as temporary:
        made = temporary / "random.safetensors"
        bench.random_patch(folder).save(made)
        yield [made]


class _Progress:
    """Shows the progress on stderr: on a terminal a line that counts the rounds.

    Elsewhere it prints a single line, if the measurement takes longer than 2 s.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.perf_counter()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._show("")

    def step(self) -> None:
        """Count one round."""
        self._done += 1
        seconds = time.perf_counter() - self._start
        left = seconds / self._done * (self._total - self._done)
        self._show(f", {left:.0f} s left")
        if self._done == 1 and not self._terminal and seconds + left > _QUIET_SECONDS:
            note(f"measuring: {plural(self._total, 'round')}, about {seconds + left:.0f} s")

    def end(self) -> None:
        """Clear the line."""
        if self._terminal:
            print(f"\r{'':<40}\r", end="", file=sys.stderr, flush=True)

    def _show(self, left: str) -> None:
        if self._terminal and self._done < self._total:
            line = f"round {self._done + 1} of {self._total}{left}"
            print(f"\r{line:<40}", end="", file=sys.stderr, flush=True)


# -- output for people -----------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    patch = f"{report['patch']}, rank {report['patch_rank']} in {plural(report['patch_slots'], 'slot')}"
    if report["patch_file"] is None:
        patch += " (made for this run; --patch FILE measures another patch)"
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
    arms = report["arms"]
    width = max(len(printable(arm["label"])) for arm in arms) + 2
    heads = "".join(f"{head:>31}" for head in ("first token", "each further token"))
    columns = f"{'median':>13}{'ratio':>8}{'per round':>10}"
    print(f"\n{'':<{width}}{heads}\n{'':<{width}}{columns}{columns}")
    for arm in arms:
        cells = "".join(
            f"{arm[f'{name}_ms']:>10.2f} ms{arm[f'{name}_ratio']:>8.3f}{arm[f'{name}_ratio_per_round']:>10.3f}"
            for name in ("first", "token")
        )
        print(f"{printable(arm['label']):<{width}}{cells}")
    print()
    loads = [arm for arm in arms if "patch_load_ms" in arm]
    switch = f"{report['switch_ms']:.3f} ms to another loaded patch ({report['patch_inputs']} inputs bound)"
    print_fields(
        [
            *(
                (
                    "load a patch",
                    f"{arm['patch_load_ms']:.2f} ms from a file of {size(arm['patch_bytes'])}"
                    + (f": {arm['label']}" if len(loads) > 1 else ""),
                )
                for arm in loads
            ),
            ("switch", switch),
            (
                "switch and step",
                f"{report['switch_first_step_ms']:.2f} ms, including a new cache and a run of one token",
            ),
            ("python", f"{report['python_ms']:.3f} ms per token outside ONNX Runtime's run"),
            *(("resident", _resident(row)) for row in report["resident"]),
        ]
    )
    print(
        f"\nmedians of {plural(report['rounds'], 'round')}: a prompt of {plural(report['prompt_tokens'], 'token')}, "
        f"then {report['tokens']} more; ratio: the ratio of the medians; per round: the median of the rounds' ratios"
    )


def _resident(row: dict[str, Any]) -> str:
    grown = row["anonymous_bytes"]
    memory = "memory unknown" if grown is None else f"{size(max(0, grown))} more memory"
    kept = f"files of {size(row['files_bytes'])}, {size(row['converted_bytes'])} converted"
    return (
        f"{row['patches']} loaded: {memory} ({kept}), switch {row['switch_ms']:.3f} ms, "
        f"{row['convert_ms']:.2f} ms if it has to be converted"
    )

"""Prepares the files, measures every runtime, and draws the plots and the tables.

    python -m benchmarks.speed [--models NAME,...] [--threads 1,2] [--builder PYTHON] [--out build/speed]

The command needs the extras cpu, export, report and bench. --builder is the Python of an environment with
onnxruntime-genai's graph builder (genai_graphs.py). Without it, genai runs only on tp-runtime's graphs. The output
names whatever cannot be measured. --step selects the steps to run: `--step report` draws the tables and plots again
from the file speed.json in --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import machine, plots, tables
from benchmarks.speed.prepare import BITS, MODELS, prepare, program
from benchmarks.speed.rivals import LONG_RIVALS, RIVALS, Rival, found_on
from benchmarks.speed.rounds import Found, Plan, cold_starts, live_rounds
from benchmarks.speed.weights import bytes_per_token
from tp_export.source import open_source
from tp_runtime.storage import ANY_FILE, atomic_file

_TEXT = Path(__file__).parent.parent / "contexts" / "policy.txt"


def compare(models: Path, threads: int, plan: Plan, rivals: tuple[Rival, ...]) -> dict[str, Any]:
    """Measure every runtime on one model with one number of threads."""
    available, left_out = found_on(models, rivals)
    if plan.long and not set(LONG_RIVALS) <= {rival.key for rival in available}:
        left_out["contexts of --long"] = f"they need {' and '.join(LONG_RIVALS)}"
        plan = replace(plan, long=())
    found = {rival.key: Found() for rival in available}
    cold_starts(available, models, threads, plan, found)
    bandwidth = live_rounds(available, models, threads, plan, found)
    rows = {}
    for rival in available:
        files = models / rival.files
        rows[rival.key] = {
            **{"label": rival.named(models), "bits": rival.bits, "runtime": rival.module},
            **{"disk_bytes": rival.disk_bytes(models), "token_bytes": bytes_per_token(files)},
            **found[rival.key].report(),
        }
    return {"bytes_per_second": median(bandwidth), "bandwidths": bandwidth, "rivals": rows, "left_out": left_out}


def patches(models: Path, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure ranks, switching and many loaded patches, with `tp-runtime bench` for every precision."""
    found: dict[str, Any] = {}
    for bits, folder in ours(models):
        command = [*program("tp_runtime", "bench"), str(folder), "--threads", str(threads), "--device", "cpu"]
        command += ["--ranks", args.ranks, "--resident", args.resident, "--rounds", str(args.rounds)]
        found[bits] = in_new_process(*command)
    return found


def batches(models: Path, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure batches of different patches (batch.py) for every precision."""
    options = ("--threads", str(threads), "--sizes", args.batch)
    return {
        bits: in_new_process(sys.executable, "-m", "benchmarks.speed.batch", str(folder), *options)
        for bits, folder in ours(models)
        if args.batch
    }


def ours(models: Path) -> list[tuple[str, Path]]:
    """Return the precision and the path of each folder that tp-runtime exported, if the folder exists."""
    return [(bits, folder) for bits in BITS if ((folder := models / f"ours-{bits}") / "patch_slots.json").exists()]


def in_new_process(*command: str) -> dict[str, Any]:
    """Return what a program writes to the file that -o names, or the reason for its failure under "failed"."""
    print(f"running: {shlex.join(command[1:])}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def text_ids(source: Path, count: int) -> tuple[int, ...]:
    """Return `count` ids of ordinary text, which repeats until there are enough."""
    ids = open_source(source).codec.render(_TEXT.read_text(encoding="utf-8"), None, raw=True)
    return tuple((ids * (count // len(ids) + 1))[:count])


def numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers that are separated by commas."""
    return tuple(int(part) for part in text.split(",") if part)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--threads", type=numbers, default=(1, 2), help="default: 1,2")
    parser.add_argument("--builder", help="Python of the environment with onnxruntime-genai's builder")
    parser.add_argument("--out", type=Path, default=Path("build/speed"), help="default: %(default)s")
    parser.add_argument("--rivals", default="", help="the keys of the runtimes to measure; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each in new processes; default: %(default)s")
    parser.add_argument("--cold", type=int, default=5, help="cold starts in new processes; default: %(default)s")
    parser.add_argument("--contexts", type=numbers, default=(32, 128, 512, 2048), help="default: 32,128,512,2048")
    parser.add_argument(
        "--decode", type=numbers, default=(128, 2048), help="context lengths to decode after; default: 128,2048"
    )
    parser.add_argument(
        "--long",
        type=numbers,
        default=(),
        help=f"longer contexts, which only {' and '.join(LONG_RIVALS)} read; default: none",
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode in a round; default: %(default)s")
    parser.add_argument("--ranks", default="0,1,4,16,64", help="default: %(default)s")
    parser.add_argument("--resident", default="1,10,100", help="default: %(default)s")
    parser.add_argument("--batch", default="1,2,4,8,16,32,64", help="numbers of rows; default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep other models' and threads' runs of an earlier file")
    parser.add_argument("--tables", type=Path, default=Path("BENCHMARKS.md"), help="default: %(default)s")
    parser.add_argument("--plots", type=Path, default=Path("benchmarks/plots"), help="default: %(default)s")
    parser.add_argument("--step", choices=("prepare", "measure", "report"), action="append", help="default: all three")
    args = parser.parse_args()
    known = {rival.key for rival in RIVALS}
    if unknown := set(filter(None, args.rivals.split(","))) - known:
        parser.error(f"unknown rivals {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return args


def main() -> None:
    """Run the steps that the command line selects."""
    args = parse()
    steps = args.step or ["prepare", "measure", "report"]
    names = args.models.split(",")
    out = args.out / "speed.json"
    failed = {}
    if "prepare" in steps:
        failed = {name: prepare(name, args.out / "models" / name, args.builder) for name in names}
    if "measure" in steps:
        measure(args, names, failed, out)
    if "report" in steps:
        found = json.loads(out.read_text(encoding="utf-8"))
        drawn = plots.draw(found, args.plots)
        tables.write(found, drawn, args.tables)


def measure(args: argparse.Namespace, names: list[str], failed: dict[str, Any], out: Path) -> None:
    """Measure each model with each number of threads in one interleaved run, and write the file after every run."""
    wanted = set(filter(None, args.rivals.split(",")))
    rivals = tuple(rival for rival in RIVALS if not wanted or rival.key in wanted)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text(encoding="utf-8"))["runs"] if args.keep and out.exists() else []
    again = {(name, threads) for name in names for threads in args.threads}
    found = {"runs": [run for run in kept if (run["model"], run["threads"]) not in again]}
    for name in names:
        models = args.out / "models" / name
        text = text_ids(models / "source", max((*args.contexts, *args.long)) + 64)
        plan = Plan(text, args.contexts, args.decode, args.long, tokens=args.tokens, rounds=args.rounds, cold=args.cold)
        for threads in args.threads:
            print(f"{name}, threads: {threads}", file=sys.stderr, flush=True)
            run = {
                **{"model": name, "threads": threads, "date": time.strftime("%Y-%m-%d")},
                "command": "python -m benchmarks.speed " + shlex.join(sys.argv[1:]),
                "machine": machine.describe(),
                "plan": {key: value for key, value in asdict(plan).items() if key != "text"},
                "not_prepared": failed.get(name, {}),
                **compare(models, threads, plan, rivals),
            }
            run |= {"patches": patches(models, threads, args), "batches": batches(models, threads, args)}
            found["runs"].append(run)
            found["runs"].sort(key=lambda run: (_order(run["model"]), run["threads"]))
            with atomic_file(out, ANY_FILE) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _order(model: str) -> tuple[int, str]:
    return (MODELS.index(model) if model in MODELS else len(MODELS), model)


if __name__ == "__main__":
    main()

"""Compares tp-runtime on an NVIDIA GPU with genai and transformers, as the benchmark on the CPU does.

    python -m benchmarks.speed.cuda [--models NAME,...] [--builder PYTHON] [--out build/speed-cuda]

The command needs a machine with CUDA and the extras gpu, export and report; onnxruntime-genai-cuda and --builder (see
genai_graphs.py) add genai. It prepares the folders that are missing, measures first tokens, decoding and the patch of
rank 16, and writes cuda.json and cuda.md to --out. Whatever cannot be measured is named there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.speed import machine
from benchmarks.speed.__main__ import numbers, text_ids
from benchmarks.speed.prepare import MODELS, program, run_step
from benchmarks.speed.rivals import CUDA_RIVALS, Rival, found_on
from benchmarks.speed.rounds import Found, Plan, cold_starts, live_rounds
from tp_runtime.storage import ANY_FILE, atomic_file

# genai's builder has the head in four bits too.
_PRECISIONS = {"fp16": "fp16", "int4-fp16": "int4-symmetric-head4-fp16"}
_GRAPHS = Path(__file__).parent.parent / "genai_graphs.py"


def prepare(name: str, folder: Path, builder: str | None) -> dict[str, str]:
    """Make the folders that are missing; return the reasons for those that could not be made."""
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    source = folder / "source"
    if not source.exists():
        found = run_step([*program("tp_export", "fetch"), name], failed, "source")
        if found is None:
            return failed
        source.symlink_to(found.strip().splitlines()[-1])
    for bits, precision in _PRECISIONS.items():
        out = folder / f"ours-{bits}"
        if not (out / "patch_slots.json").exists():
            run_step(
                [*program("tp_export", "model"), str(source), str(out), "--precision", precision], failed, out.name
            )
    for precision in ("fp16", "int4") if builder else ():
        out = folder / f"genai-cuda-{precision}"
        if not (out / "genai_config.json").exists():
            command = [str(builder), str(_GRAPHS), str(source), str(folder / "made"), "--device", "cuda"]
            run_step([*command, "--precisions", precision], failed, out.name)
            if out.name not in failed:
                (folder / "made" / precision).rename(out)
    return failed


def gpu() -> dict[str, str]:
    """Return the GPU's name, memory and compute capability, and the driver's version."""
    names = ("name", "driver_version", "compute_cap", "memory.total")
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=" + ",".join(names), "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=True))


def table(run: dict[str, Any]) -> list[str]:
    """Return the Markdown table of one model: a row for each runtime, and milliseconds."""
    contexts, decode = run["plan"]["contexts"], run["plan"]["decode"]
    first = {"none": "no context", **{f"prompt-{n}": f"{n}" for n in contexts}, "patch": "patch"}
    steps = {**{f"prompt-{n}": f"token after {n}" for n in decode}, f"patched-{decode[0]}": "token, patch"}
    heads = ["cold start s", *(f"first token, {label}" for label in first.values()), *steps.values()]
    lines = ["| runtime | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in run["rivals"].values():
        cells = [f"{row['cold_start_s']:.2f}" if "cold_start_s" in row else ""]
        for kind, names in (("first_s", first), ("token_s", steps)):
            cells += [f"{1e3 * row[kind][name]:.2f}" if name in row[kind] else "" for name in names]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    for name, row in run["rivals"].items():
        lines += [f"{name}, {what}: {reason}" for what, reason in row["failed"].items()]
    return [*lines, *(f"{name}: {reason}" for name, reason in run["left_out"].items())]


def compare(models: Path, threads: int, plan: Plan, rivals: tuple[Rival, ...]) -> dict[str, Any]:
    """Measure every runtime on one model."""
    available, left_out = found_on(models, rivals)
    found = {rival.key: Found() for rival in available}
    cold_starts(available, models, threads, plan, found)
    # One process at a time: a GPU that several processes have open takes tens of milliseconds to turn to another one.
    for number in range(plan.rounds):
        for at in range(len(available)):
            live_rounds([available[(number + at) % len(available)]], models, threads, replace(plan, rounds=1), found)
    return {"rivals": {r.key: {"label": r.label, **found[r.key].report()} for r in available}, "left_out": left_out}


def main() -> None:
    """Prepare, measure, and write the file and the table after every model."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.cuda", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--builder", help="Python of the environment with onnxruntime-genai's builder")
    parser.add_argument("--out", type=Path, default=Path("build/speed-cuda"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each in new processes; default: %(default)s")
    parser.add_argument("--cold", type=int, default=3, help="cold starts in new processes; default: %(default)s")
    parser.add_argument("--contexts", type=numbers, default=(128, 512, 2048), help="default: 128,512,2048")
    parser.add_argument("--decode", type=numbers, default=(128, 2048), help="default: 128,2048")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode in a round; default: %(default)s")
    args = parser.parse_args()
    found: dict[str, Any] = {"gpu": gpu(), "runs": []}
    for name in args.models.split(","):
        models = args.out / "models" / name
        failed = prepare(name, models, args.builder)
        text = text_ids(models / "source", max(args.contexts) + 64)
        plan = Plan(text, args.contexts, args.decode, tokens=args.tokens, rounds=args.rounds, cold=args.cold)
        run = {
            **{"model": name, "date": time.strftime("%Y-%m-%d"), "machine": machine.describe()},
            "command": "python -m benchmarks.speed.cuda " + shlex.join(sys.argv[1:]),
            "plan": {key: value for key, value in asdict(plan).items() if key != "text"},
            "not_prepared": failed,
            **compare(models, machine.describe()["cpus"], plan, CUDA_RIVALS),
        }
        found["runs"].append(run)
        pages = [f"{found['gpu']}\n"]
        pages += ["\n".join((f"## {run['model']}\n", *table(run))) + "\n" for run in found["runs"]]
        for file, text_of in (("cuda.json", json.dumps(found, indent=1) + "\n"), ("cuda.md", "\n".join(pages))):
            with atomic_file(args.out / file, ANY_FILE) as temporary:
                temporary.write_text(text_of, encoding="utf-8")
        print(pages[-1])


if __name__ == "__main__":
    main()

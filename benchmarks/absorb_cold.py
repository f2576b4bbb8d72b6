"""Measures the first token of a new process: without a prompt, under the absorbed prompt, and behind the prompt.

    python benchmarks/absorb_cold.py MODEL_DIR --prompt-file FILE --queries HELD_OUT [--rounds N] [--dtype f16]

The prompt is absorbed once (`model.absorb`). Then each round starts one process for each side, in an order that
changes, and takes the time from the start of the process to its first token; imports, the model, the patch file and the
prompt are part of it. The same is taken of the processor's time, which other programs on the machine change less. The
script prints the median over the rounds of each side's ratio to no prompt. At the end it compares the greedy answers to
all queries under the patch file with those behind the prompt. It prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tp_runtime import PatchedModel
from tp_runtime.patch import DTYPES, Patch
from tp_runtime.storage import temporary_folder

SIDES = ("none", "absorbed", "prompted")
QUERY = "How long do I have to return a drill?"
CHILD = """
import sys, time
from tp_runtime import PatchedModel
folder, threads, patch, prompt, query = sys.argv[1:]
model = PatchedModel.from_pretrained(folder, "cpu", threads=int(threads), patch=patch or None)
system = open(prompt, encoding="utf-8").read().rstrip("\\r\\n") if prompt else None
next(iter(model.stream(query, system=system, max_new_tokens=2)))
print(time.monotonic(), time.process_time())
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True, help="one query per line")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--compare", nargs="+", choices=SIDES[1:], default=SIDES[1:], help="with no prompt; default: both"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48, help="the length of the answers that are compared")
    parser.add_argument("--dtype", choices=DTYPES, help="the dtype of the patch file; default: the exact one")
    args = parser.parse_args()
    sides = (SIDES[0], *args.compare)
    system = args.prompt_file.read_text(encoding="utf-8").rstrip("\r\n")
    model = PatchedModel.from_pretrained(args.model, "cpu", threads=args.threads)
    with temporary_folder() as folder:
        file = folder / "absorbed.safetensors"
        made = model.absorb(system, dtype=args.dtype)
        made.save(file)
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(args.rounds + 1):  # the first one fills the system's file cache
            turn = number % len(sides)
            for side in (*sides[turn:], *sides[:turn]):
                took = _cold(args, side, file)
                if number:
                    found[side].append(took)
            print(f"round {number} of {args.rounds}", file=sys.stderr)
        patch = Patch.load(file)
    queries = [line for line in args.queries.read_text(encoding="utf-8").splitlines() if line.strip()]
    options = {"max_new_tokens": args.tokens}
    equal = sum(
        model.generate(query, system=system, **options) == model.generate(query, patch=patch, **options)
        for query in queries
    )
    report = {
        "model": f"{model.graph.folder.base_model} {model.graph.folder.precision}",
        "prompt_tokens": 0 if made.prefix is None else made.prefix.position,
        "file": {"dtype": patch.dtype, "bytes": patch.nbytes},
        "rounds": args.rounds,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "clock": _medians({side: [wall for wall, _cpu in one] for side, one in found.items()}),
        "processor": _medians({side: [cpu for _wall, cpu in one] for side, one in found.items()}),
        "equal_greedy_answers": f"{equal} of {len(queries)}",
    }
    print(json.dumps(report))


def _medians(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return the median of each side, and that of its ratios to no prompt."""
    ratios = {
        side: median(one / base for one, base in zip(own, seconds["none"], strict=True))
        for side, own in seconds.items()
    }
    return {
        "median_s": {side: round(median(own), 3) for side, own in seconds.items()},
        "median_of_ratios_to_none": {side: round(ratio, 3) for side, ratio in ratios.items()},
    }


def _cold(args: argparse.Namespace, side: str, file: Path) -> tuple[float, float]:
    """Return the seconds from the start of a process to its first token: of the clock, and of the processor."""
    patch, prompt = str(file) if side == "absorbed" else "", str(args.prompt_file) if side == "prompted" else ""
    command = [sys.executable, "-c", CHILD, str(args.model), str(args.threads), patch, prompt, QUERY]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ended, processor = map(float, done.stdout.split())
    return ended - started, processor


if __name__ == "__main__":
    main()

"""Measures the effect of huge pages on the first token and on later ones: the figures of docs/serving.md.

    python benchmarks/huge_pages.py MODEL_DIR [--threads 1] [--rounds 5]

Each sample runs in its own process, and processes with and without huge pages alternate. This is necessary because the
place where a process's memory lies makes as much of a difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

_PROMPT, _SKIPPED, _TOKENS = 32, 150, 60  # in tokens; the background work ends during the skipped ones


def sample(model: Path, threads: int, huge: bool) -> dict[str, float]:
    """Measure in this process the milliseconds from opening the folder to the first token, and of a later token."""
    import numpy as np
    import onnxruntime  # noqa: F401  (imported before the clock starts: its import is not part of the model's time)

    from tp_runtime.session import Graph, ModelFolder

    start = time.perf_counter()
    graph = Graph(ModelFolder.open(model), "cpu", threads=threads, huge_pages=huge)
    prompt = np.random.default_rng(0).integers(0, graph.folder.vocab_size, _PROMPT).tolist()
    cache = graph.new_cache(graph.base)
    graph.forward(prompt, cache, graph.base)
    first = time.perf_counter() - start
    steps = []
    for number in range(_SKIPPED + _TOKENS):
        start = time.perf_counter()
        graph.forward([number], cache, graph.base)
        steps.append(time.perf_counter() - start)
    return {"first": 1e3 * first, "token": 1e3 * median(steps[_SKIPPED:])}


def main() -> None:
    """Print the medians over the processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", choices=("with", "without"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sample:
        print(json.dumps(sample(args.model, args.threads, args.sample == "with")))
        return
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for number in range(args.rounds):
        for variant in sorted(found, reverse=bool(number % 2)):
            command = [sys.executable, __file__, str(args.model), "--threads", str(args.threads), "--sample", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[variant].append(json.loads(done.stdout))
    for variant, samples in found.items():
        figures = {name: round(median(one[name] for one in samples), 2) for name in ("first", "token")}
        print(json.dumps({"huge pages": variant, "threads": args.threads, **figures}))


if __name__ == "__main__":
    main()

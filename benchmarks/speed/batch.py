"""Compares a step of a batch whose rows all have different patches with a step of one whose rows all run the base.

    python -m benchmarks.speed.batch MODEL [--device cpu] [--threads 1] [--sizes 1,2,4,8,16,32,64] [-o FILE]

The two batches alternate step by step. All rows have prompts of the same length, so that nothing but the patches and
the number of rows differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tp_runtime import PatchedModel
from tp_runtime.bench import RANK, random_patch
from tp_runtime.generation import Batch, Sampler
from tp_runtime.session import BoundPatch, Graph

SIZES = (1, 2, 4, 8, 16, 32, 64)


def filled(graph: Graph, bounds: Sequence[BoundPatch], prompt: list[int], steps: int) -> Batch:
    """Return a batch that has one row under each of `bounds` and can run `steps` steps."""
    made = Batch(graph, len(bounds))
    for bound in bounds:
        made.join(prompt, bound, sampler=Sampler(), max_new_tokens=steps + 1, eos_ids=frozenset())
    return made


def measure(model: PatchedModel, sizes: Sequence[int], prompt_tokens: int, steps: int) -> list[dict[str, Any]]:
    """Return for each size the median milliseconds of a step, and the median over the ratios of paired steps."""
    graph = model.graph
    prompt = np.random.default_rng(0).integers(0, graph.folder.vocab_size, prompt_tokens).tolist()
    bounds = [graph.bind(random_patch(graph.folder, RANK, seed)) for seed in range(max(sizes))]
    rows = []
    for size in sizes:
        print(f"batch of {size}", file=sys.stderr, flush=True)
        batches = [filled(graph, arm, prompt, steps + 2) for arm in ([graph.base] * size, bounds[:size])]
        seconds: list[list[float]] = [[], []]
        for number in range(steps + 2):
            for arm in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                batches[arm].step()
                if number > 1:  # the first steps allocate buffers
                    seconds[arm].append(time.perf_counter() - start)
        base, patched = (1e3 * median(values) for values in seconds)
        ratio = median(one / other for one, other in zip(seconds[1], seconds[0], strict=True))
        rows.append({"rows": size, "base_ms": base, "patched_ms": patched, "ratio_per_step": ratio})
    return rows


def main() -> None:
    """Measure one model with one number of threads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    model = PatchedModel.from_pretrained(args.model, args.device, threads=args.threads)
    sizes = [int(size) for size in args.sizes.split(",")]
    found = {"rank": RANK, "prompt_tokens": args.prompt_tokens, "steps": args.steps}
    text = json.dumps({**found, "sizes": measure(model, sizes, args.prompt_tokens, args.steps)}, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()

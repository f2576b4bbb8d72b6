"""Measures how far exports on CUDA are from float32 on the CPU, beside the CPU in the same precision: docs/cuda.md.

    python benchmarks/cuda_accuracy.py FP32_FOLDER FOLDER... [--tokens 160]

The folders are exports of one model. The script prints a Markdown row for each: the mean KL divergence in nats over the
positions of a text, for one run of it on the CPU and on CUDA, and for single steps over its second half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tp_runtime.session import Graph, ModelFolder
from tp_runtime.text import TextCodec

_TEXT = Path(__file__).parent / "contexts" / "policy.txt"


def log_probabilities(graph: Graph, ids: list[int], steps: bool = False) -> NDArray[np.float64]:
    """Return the log-probabilities [ids, vocab] of the base; with `steps` the second half runs id by id."""
    cache = graph.new_cache(graph.base)
    whole = len(ids) // 2 if steps else len(ids)
    runs = [ids[:whole], *([token] for token in ids[whole:])]
    parts = [graph.forward(run, cache, graph.base, all_logits=True) for run in runs]
    logits = np.concatenate(parts).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fp32", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=160)
    args = parser.parse_args()
    exact = ModelFolder.open(args.fp32)
    text = _TEXT.read_text(encoding="utf-8")
    ids = list(TextCodec.from_model_folder(exact).render(text, None, raw=True))[: args.tokens]
    wanted = log_probabilities(Graph(exact, "cpu"), ids)

    def far(graph: Graph, steps: bool = False) -> str:
        return f"{(np.exp(wanted) * (wanted - log_probabilities(graph, ids, steps))).sum(-1).mean():.2g}"

    print("| model | precision | CPU | CUDA, one run | CUDA, steps | CUDA, captured steps |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for path in args.folders:
        folder = ModelFolder.open(path)
        cpu, cuda = far(Graph(folder, "cpu")), Graph(folder, "cuda")
        captured = ""
        if folder.kv.dtype == "f16":
            captured = far(Graph(folder, "cuda", cuda_graphs=True), steps=True)
        row = (folder.base_model, folder.precision, cpu, far(cuda), far(cuda, steps=True), captured)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

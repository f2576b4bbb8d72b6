"""What a batch whose rows join and leave asks of the GPU: this module runs in the stand-in's environment.

    python -m runtime_tests.gpu.standin.batches MODEL_DIR

It prints JSON, like inside.py. test_batches.py states what its numbers must be.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime_tests.gpu.standin.inside import counted, patch_of
from runtime_tests.logits import token_ids
from tp_runtime.generation import Batch, Row, Sampler, WantedLogprobs
from tp_runtime.session import BoundPatch, Graph, ModelFolder

LENGTHS = (20, 300, 4)  # of the prompts; the second one does not fit into the first buffers of a cache
AMPLE = 99  # new tokens: no row ends before it is made to leave


def join(batch: Batch, length: int, bound: BoundPatch) -> Row:
    prompt, sampler = token_ids(length, seed=length), Sampler(logprobs=WantedLogprobs(0))  # it needs all logits
    return batch.join(prompt, bound, sampler=sampler, max_new_tokens=AMPLE, eos_ids=frozenset())


def changes(graph: Graph, bounds: list[BoundPatch]) -> list[dict[str, Any]]:
    """Return the counts of rows that join a batch, of a row that leaves it, and of the steps in between."""
    batch, rows, found = Batch(graph, len(bounds)), [], []

    def note(what: str, act: Any) -> None:
        found.append({"what": what, "rows": len(batch.rows), **asdict(counted(act))})

    for length, bound in zip(LENGTHS, bounds, strict=True):

        def joins(length: int = length, bound: BoundPatch = bound) -> None:
            rows.append(join(batch, length, bound))
            while rows[-1] not in batch.rows:
                batch.step()

        note("join", joins)
        for _ in range(3):
            note("step", batch.step)
    note("leave", lambda: (batch.leave(rows[0]), batch.step()))
    return found


def measure(folder: ModelFolder) -> dict[str, Any]:
    """Return every measurement."""
    values = 2 * folder.layers * folder.kv.heads * folder.kv.head_dim * folder.kv.numpy_dtype.itemsize
    found: dict[str, Any] = {"bytes_per_position": values, "vocab": folder.vocab_size}
    for name in ("ordinary", "captured"):
        graph = Graph(folder, "cuda", cuda_graphs=name == "captured")
        patched = graph.bind(patch_of(folder, 4))
        found["patch_bytes"] = sum(value.numpy().nbytes for value in patched.values.values())
        found[name] = {
            "failure": graph.capture_failure,
            "device": graph.kv.device,
            "first": changes(graph, [graph.base] * len(LENGTHS)),  # some buffers are filled once
            "alike": changes(graph, [graph.base] * len(LENGTHS)),
            "unlike": changes(graph, [graph.base, patched, graph.base]),
        }
    return found


if __name__ == "__main__":
    json.dump(measure(ModelFolder.open(Path(sys.argv[1]))), sys.stdout)

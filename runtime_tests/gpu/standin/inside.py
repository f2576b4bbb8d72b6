"""What is measured on the stand-in: this module runs in its environment, on one model folder, and prints JSON.

    python -m runtime_tests.gpu.standin.inside MODEL_DIR

It needs neither torch nor pytest, which the environment does not have. Every function below is one measurement, and
test_standin.py states what its numbers must be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runtime_tests.gpu.standin.counters import Counts, counts, kernels
from runtime_tests.patches import patch_for
from tp_runtime.generation import Batch, Sampler, Sampling, generate
from tp_runtime.patch import Patch
from tp_runtime.session import BoundPatch, DeviceStep, Graph, ModelFolder
from tp_runtime.session.device import CPU, CUDA
from tp_runtime.session.interface import BEST_IDS, BEST_VALUES

PROMPT = (5, 6, 7, 8)
RANKS = (None, 4, 16, 64, 65)  # of the patches; None is the base
REQUESTS = {
    "greedy": Sampling(),
    "top_k": Sampling(temperature=1.0, top_k=40, seed=1),
    "all logits": Sampling(temperature=1.0, seed=1),
}


def placement(folder: ModelFolder) -> dict[str, list[str]]:
    """Return the operators that each provider runs, as they are after ONNX Runtime's own changes to the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(folder.path / "model.onnx"), options, [CUDA, CPU])
    operators: dict[str, list[str]] = {CUDA: [], CPU: []}
    for part in session.get_provider_graph_assignment_info():
        operators[part.ep_name] += [node.op_type for node in part.get_nodes()]
    return operators


def steps(graph: Graph, bound: BoundPatch, sampling: Sampling, number: int = 8) -> Iterator[Counts]:
    """Yield the counts of each id of a completion, the first of which belongs to the prompt."""
    cache, sampler = graph.new_cache(bound), Sampler(sampling)
    before = counts()
    for _id in generate(graph, PROMPT, bound, sampler=sampler, max_new_tokens=number, eos_ids=frozenset(), cache=cache):
        yield counts() - before
        write_best(cache.step)
        write_best(None if graph.captured is None else graph.captured.io)
        before = counts()


def write_best(step: object) -> None:
    """Write what kernels would: largest logits, without ties. Zeros would be ties, for which all logits are fetched."""
    if isinstance(step, DeviceStep) and step.best is not None:
        memory = step.best.new_memory()
        written = step.best.arrays(memory)
        best = written[BEST_IDS].shape[1]
        written[BEST_VALUES][:], written[BEST_IDS][:] = np.arange(best, 0, -1), np.arange(best)
        step.best.send(memory)


def counted(act: Callable[[], object]) -> Counts:
    """Return the counts of one call."""
    before = counts()
    act()
    return counts() - before


def patch_of(folder: ModelFolder, rank: int | None, seed: int = 1) -> Patch | None:
    """Return a random patch of a rank on every slot, or None for the base."""
    return None if rank is None else patch_for(folder, seed=seed, rank=rank, scale=0.3)


def switches(graph: Graph) -> list[dict[str, Any]]:
    """Return the counts of switching captured steps to each patch, and the bytes of its tensors in the bucket."""
    assert graph.captured is not None
    found = []
    for rank in (4, 16, 64):
        bound = graph.bind(patch_of(graph.folder, rank, seed=2))
        slots = graph.folder.slots.values()
        size = graph.dtype.itemsize * sum(rank * (slot.inputs + slot.outputs) + slot.outputs for slot in slots)
        switch = partial(graph.captured.switch, bound.key, bound.deltas)
        first, again = counted(switch), counted(switch)
        found.append(
            {
                "rank": rank,
                "bytes": size,
                "tensors": 3 * len(graph.folder.slots),
                "first": asdict(first),
                "again": asdict(again),
            }
        )
    return found


def batch_steps(graph: Graph) -> Iterator[Counts]:
    """Yield the counts of each step of a batch of three greedy rows under different patches."""
    batch = Batch(graph, 4)
    for rank in (None, 4, 16):
        bound = graph.bind(patch_of(graph.folder, rank))
        batch.join(PROMPT, bound, sampler=Sampler(), max_new_tokens=8, eos_ids=frozenset())
    for _step in range(8):
        yield counted(batch.step)
        write_best(batch._rows._io)  # type: ignore[attr-defined]


def measure(folder: ModelFolder) -> dict[str, Any]:
    """Return every measurement."""
    found: dict[str, Any] = {
        "vocab": folder.vocab_size,
        "layers": folder.layers,
        "slots": len(folder.slots),
        "windowed": folder.windowed is not None,
        "placement": placement(folder),
        "steps": [],
    }
    for cuda_graphs in (False, True):
        before = counts()
        graph = Graph(folder, "cuda", cuda_graphs=cuda_graphs)
        if cuda_graphs:
            opened = counts() - before
            found["capture"] = {"failure": graph.capture_failure, **asdict(opened)}
        for rank in RANKS:
            bound = graph.bind(patch_of(folder, rank))
            for name, sampling in REQUESTS.items():
                about = {"captured": cuda_graphs, "rank": rank, "request": name}
                counted_steps = enumerate(steps(graph, bound, sampling))
                found["steps"] += [{**about, "number": number, **asdict(step)} for number, step in counted_steps]
        about = {"captured": cuda_graphs, "rank": "mixed", "request": "batch"}
        found["steps"] += [{**about, "number": n, **asdict(step)} for n, step in enumerate(batch_steps(graph))]
        if graph.captured is not None:
            found["switches"] = switches(graph)
    found["kernels"] = kernels()
    return found


if __name__ == "__main__":
    json.dump(measure(ModelFolder.open(Path(sys.argv[1]))), sys.stdout)

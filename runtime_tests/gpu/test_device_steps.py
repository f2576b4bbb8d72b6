"""Decode steps whose inputs and outputs stay on the device, run on the CPU provider, where kernels compute.

The same graphs and the same code run on CUDA; the stand-in shows there what crosses the bus, and a GPU what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pytest

from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import Batch, Sampler, Sampling, generate
from tp_runtime.patch import Patch
from tp_runtime.session import BestLogits, Graph, Lengths, ModelFolder, Use
from tp_runtime.session import cuda_graphs as cuda_graphs
from tp_runtime.session.open_session import start_captured

PROMPT = [5, 6, 7, 8, 9]
REQUESTS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=20, seed=1),
    Sampling(temperature=1.0, top_k=100, top_p=0.9, seed=2),
    Sampling(temperature=1.0, top_p=0.9, seed=3),  # needs all logits
    Sampling(repetition_penalty=1.3),  # too
]


@pytest.fixture(scope="module")
def plain(float16_folder: Path) -> Graph:
    return Graph(ModelFolder.open(float16_folder), "cpu")


@pytest.fixture(scope="module", params=["ordinary", "captured"])
def on_device(request: pytest.FixtureRequest, plain: Graph) -> Graph:
    """The same model with the steps that CUDA has."""
    graph = Graph(plain.folder, "cpu")
    graph._steps_in_place, graph.device_steps = False, graph._new_device_steps()
    if request.param == "captured":
        graph.captured = start_captured(
            graph.folder, graph.session, graph.ort, graph.device.kind, graph._run_io, graph.kv
        )
    return graph


def patches(graph: Graph) -> list[Patch | None]:
    patch, folder = patch_for(graph.folder, rank=4, scale=0.3), graph.folder
    found = [None, patch, with_prefix(patch, folder, replaces=[5], entries=7, position=9)]
    if folder.windowed is not None:
        found.append(with_prefix(patch, folder, replaces=[5], entries=Lengths(12, 6), position=14))
    return found


def completion(graph: Graph, patch: Patch | None, sampling: Sampling, prompt: list[int] = PROMPT) -> list[int]:
    sampler, ends = Sampler(sampling), frozenset[int]()
    return list(generate(graph, prompt, graph.bind(patch), sampler=sampler, max_new_tokens=20, eos_ids=ends))


@pytest.mark.parametrize("sampling", REQUESTS)
def test_completions_are_those_of_ordinary_steps(plain: Graph, on_device: Graph, sampling: Sampling) -> None:
    for patch in patches(plain):
        assert completion(on_device, patch, sampling) == completion(plain, patch, sampling)


def batch_completions(graph: Graph, samplings: Sequence[Sampling]) -> list[list[int]]:
    """Return the tokens of a batch whose rows join one by one, with other patches, lengths and settings."""
    batch, rows, ends = Batch(graph, 4), [], frozenset[int]()
    for patch, sampling in zip(cycle(patches(graph)), samplings, strict=False):
        prompt, sampler = [*PROMPT, *range(20, 20 + 3 * len(rows))], Sampler(sampling)
        rows.append(batch.join(prompt, graph.bind(patch), sampler=sampler, max_new_tokens=12, eos_ids=ends))
        batch.step()
    while batch.rows:
        batch.step()
    return [row.tokens for row in rows]


@pytest.mark.parametrize("samplings", [REQUESTS[:3], REQUESTS[:4]], ids=["largest logits", "all logits"])
def test_batches_are_those_of_ordinary_steps(plain: Graph, on_device: Graph, samplings: Sequence[Sampling]) -> None:
    assert batch_completions(on_device, samplings) == batch_completions(plain, samplings)


def test_a_step_returns_the_largest_logits_only_if_they_suffice(on_device: Graph) -> None:
    bound = on_device.base
    cache = on_device.new_cache(bound)
    held = Use(cache.uses)
    cache.take(held)
    on_device.forward(PROMPT, cache, bound, held=held)
    (best,) = on_device.forward_best([1], cache, bound, best=3, last=1, held=held)
    assert isinstance(best, BestLogits) and len(best.ids) >= 3
    del cache.tokens[-1]
    (whole,) = on_device.forward_best([1], cache, bound, best=on_device.folder.best + 1, last=1, held=held)
    assert not isinstance(whole, BestLogits) and (whole[best.ids] == best.values).all()
    assert whole.argmax() == best.ids[best.values.argmax()]


def test_steps_can_alternate_with_runs_of_several_ids(plain: Graph, on_device: Graph) -> None:
    """A run of several ids takes its own lengths and returns logits of other positions than a step."""
    for patch in patches(plain):
        logits = []
        for graph in (plain, on_device):
            bound = graph.bind(patch)
            cache = graph.new_cache(bound)
            runs = [[5, 6, 7], [8], [9], [10, 11, 12], [13], [14, 15]]
            logits.append([graph.forward(run, cache, bound, last=2) for run in runs])
        for one, other in zip(*logits, strict=True):
            assert one.shape == other.shape and abs(one - other).max() < 1e-2 * abs(one).max()


def test_runs_of_other_shapes_follow_a_step_and_one_another(plain: Graph, on_device: Graph) -> None:
    logits = []
    for graph in (plain, on_device):
        cache = graph.new_cache(graph.base)
        cache.batched = True  # so that no step is captured
        graph.forward(PROMPT, cache, graph.base)
        graph.forward([3], cache, graph.base)
        for last in (4, 2, 3, 1, 5):
            logits.append(graph.forward([8, 9, 4, 5, 6][:last], cache, graph.base, last=last))
    for one, two in zip(logits[:5], logits[5:], strict=True):
        assert abs(one - two).max() < 0.02

"""The runtime on CUDA, compared with exact results and with the CPU. `run.sh` in this folder runs it on a GPU.

The exact results are those of a graph with the same weights that computes in float32 on the CPU. Rounding moves the
logits of some patched models far: in float16 by up to 8 % of the largest logit, on both devices. So CUDA may be at most
twice as far from the exact logits as the CPU is in the same precision. Nothing here falls back to the CPU: every graph
requests `cuda`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pytest

from runtime_tests.logits import Logits, furthest, graph_logits, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_export.graph import export_model
from tp_export.source import open_source
from tp_runtime.bench import switch_seconds
from tp_runtime.errors import DeviceUnavailableError
from tp_runtime.generation import Row, Sampler, Sampling, WantedLogprobs, generate, prompt_entries
from tp_runtime.generation.rows import new_rows
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import BestLogits, BoundPatch, Graph, Lengths, ModelFolder, Use
from tp_runtime.session.device import CUDA, select_device

DEVICE = "cuda"
CHOSEN = select_device("auto")
REQUIRED = "TP_REQUIRE_GPU" in os.environ  # then a missing GPU fails instead of skipping
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CHOSEN.provider != CUDA and not REQUIRED, reason=str(CHOSEN.reason)),
]

# By precision: the precision of the exact graph, and the distance from its logits that is always allowed, as a fraction
# of the largest logit. CUDA computes int4 in float32, and the CPU's kernel rounds activations to eight bits.
EXACT = {"fp32": "fp32", "fp16": "fp32", "int4-rtn": "int4-rtn", "int4-rtn-fp16": "int4-rtn"}
CLOSE = {"fp32": 1e-3, "fp16": 1e-2, "int4-rtn": 1e-3, "int4-rtn-fp16": 1e-2}
IDS = token_ids(48)
STEPS = (24, *(1,) * 24)


@dataclass(frozen=True, eq=False)
class Pair:
    """One model folder, opened on both devices."""

    exact: Graph
    cpu: Graph
    cuda: Graph

    def require_close(self, compute: Callable[[Graph], Logits], graph: Graph | None = None) -> None:
        """Require that what a graph on CUDA computes is as close to the exact logits as what the CPU computes."""
        exact, allowed = compute(self.exact), CLOSE[self.cuda.folder.precision]
        if self.cuda.folder.kv.dtype == "f16":
            allowed = max(allowed, 2 * self.distance(compute(self.cpu), exact))
        assert self.distance(compute(graph or self.cuda), exact) < allowed

    @staticmethod
    def distance(got: Logits, wanted: Logits) -> float:
        """Return the largest difference as a fraction of the largest logit."""
        return furthest(got, wanted) / float(np.abs(wanted).max())

    def patch(self, rank: int, seed: int = 1) -> Patch:
        """Return a patch that changes the logits about as much as they differ from 0."""
        return patch_for(self.cpu.folder, seed=seed, rank=rank, scale=0.05)


def on_cuda(folder: ModelFolder, **options: Any) -> Graph:
    try:
        return Graph(folder, DEVICE, **options)
    except DeviceUnavailableError as error:
        if REQUIRED:
            raise
        pytest.skip(str(error))


MODELS = [
    pytest.param((model, precision), id=f"{model}-{precision}", marks=[pytest.mark.real_model] * (model == "smollm2"))
    for model in ("tiny_llama", "tiny_gemma", "smollm2")
    for precision in CLOSE
]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model, precision = request.param
    out = tmp_path_factory.mktemp("gpu") / f"{model}-{precision}"
    slots = "all" if model == "tiny_gemma" else "output"
    source = open_source(request.getfixturevalue(model))
    export_model(source, out, slot_set=slots, precision=precision)
    exact = out.with_name("exact")
    with mock.patch("tp_export.graph.quantise._INT8_ACTIVATIONS", 1):  # MatMulNBits then computes in float32
        export_model(source, exact, slot_set=slots, precision=EXACT[precision])
    folder = ModelFolder.open(out)
    return Pair(Graph(ModelFolder.open(exact), "cpu"), Graph(folder, "cpu"), on_cuda(folder))


@pytest.fixture(scope="module")
def captured(pair: Pair) -> Graph:
    return on_cuda(pair.cuda.folder, cuda_graphs=True)


def record(name: str, values: dict[str, Any]) -> None:
    """Print figures and adds them to the file that run.sh collects."""
    print(f"\n{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if file := os.environ.get("TP_GPU_RESULTS"):
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps({"name": name, **values}) + "\n")


def named(pair: Pair) -> str:
    folder = pair.cuda.folder
    return f"{folder.base_model} {folder.precision}"


# -- the device ----------------------------------------------------------------------------------------------


def test_graph_patches_and_caches_are_on_cuda(pair: Pair) -> None:
    graph = pair.cuda
    assert (graph.device.provider, graph.device.reason, graph.session.get_providers()[0]) == (CUDA, None, CUDA)
    bound = graph.bind(pair.patch(4))
    cache = graph.new_cache(bound)
    graph.forward(IDS[:5], cache, bound)
    assert {value.device_name() for value in bound.values.values()} == {DEVICE}
    attention = DEVICE if graph.folder.kv.dtype == "f16" else "cpu"  # CUDA's attention operator has no float32 kernel
    assert {value.device_name() for value in cache.buffers.values()} == {attention} == {graph.kv.device}


def test_auto_selects_cuda(pair: Pair) -> None:
    assert Graph(pair.cuda.folder, "auto").device.kind == DEVICE


def patched_logits(graph: Graph, patch: Patch | None, chunks: Sequence[int] = ()) -> Logits:
    return graph_logits(graph, IDS, graph.bind(patch), chunks)


# -- logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(), STEPS, (20, 1, 1, 20, 6)], ids=["at once", "steps", "chunks"])
@pytest.mark.parametrize("rank", [None, 0, 1, 16, 60])
def test_logits_match_those_of_the_cpu(pair: Pair, rank: int | None, chunks: Sequence[int]) -> None:
    patch = None if rank is None else pair.patch(rank)
    pair.require_close(partial(patched_logits, patch=patch, chunks=chunks))


def test_a_patch_changes_the_logits(pair: Pair) -> None:
    base, patched = (graph_logits(pair.cuda, IDS, pair.cuda.bind(patch)) for patch in (None, pair.patch(16)))
    assert pair.distance(patched, base) > 0.2


def test_bound_slots_of_rank_zero_give_the_base(pair: Pair) -> None:
    """The graph multiplies matrices of rank 0 under IO binding."""
    graph = pair.cuda
    values = graph._binder._slot_values({}, graph.device.kind)
    bound = BoundPatch(lambda: values, graph.base.key)
    assert (
        bound.values and furthest(graph_logits(graph, IDS, bound, STEPS), graph_logits(graph, IDS, chunks=STEPS)) == 0
    )


def test_binding_and_dropping_patches_does_not_change_the_base(pair: Pair) -> None:
    before = graph_logits(pair.cuda, IDS, chunks=STEPS)
    for rank in (0, 4, 60):
        graph_logits(pair.cuda, IDS, pair.cuda.bind(pair.patch(rank, seed=rank)), STEPS)
        assert np.array_equal(graph_logits(pair.cuda, IDS, chunks=STEPS), before)


def test_a_patch_set_as_default_matches_the_cpu(pair: Pair) -> None:
    patch = pair.patch(4)
    graph = on_cuda(pair.cuda.folder, defaults=patch)
    pair.require_close(lambda one: graph_logits(one, IDS, one.default if one is graph else one.bind(patch)), graph)
    pair.require_close(lambda one: graph_logits(one, IDS, one.base), graph)


def prefixed_logits(graph: Graph, patch: Patch) -> Logits:
    bound = graph.bind(patch)
    cache = graph.new_cache(bound)
    logits = [graph.forward(IDS[:9], cache, bound)]
    logits += [graph.forward([token], cache, bound) for token in IDS[9:30]]
    return np.concatenate(logits)


def prefixed(pair: Pair) -> list[Patch]:
    """Return patches with entries; where a graph has full and windowed layers, also with a count for each kind."""
    folder = pair.cpu.folder
    counts: list[int | Lengths] = [5] if folder.windowed is None else [5, Lengths(20, 6), Lengths(4, 13)]
    return [with_prefix(pair.patch(4), folder, replaces=[7, 8], entries=entries, position=25) for entries in counts]


def test_a_kv_prefix_matches_the_cpu(pair: Pair) -> None:
    for patch in prefixed(pair):
        pair.require_close(partial(prefixed_logits, patch=patch))


def test_a_prompt_runs_into_the_entries_that_the_cpu_gives(pair: Pair) -> None:
    """A patch that was absorbed on either device runs on both."""
    for where in (pair.cpu, pair.cuda):
        entries = prompt_entries(where, IDS, (7, 8), where.base)
        patch = Patch({}, replace(pair.patch(4).config, method="prefix"), entries)
        pair.require_close(partial(prefixed_logits, patch=patch))


def test_a_batch_of_different_patches_matches_the_cpu(pair: Pair) -> None:
    patches = [None, pair.patch(4), prefixed(pair)[-1], pair.patch(0)]

    def batch(graph: Graph) -> Logits:
        buffers, rows = new_rows(graph, 4), []
        for length, patch in zip((9, 20, 5, 12), patches, strict=True):
            bound = graph.bind(patch)
            cache = graph.new_cache(bound)
            prompt = [*cache.tokens, *IDS[:length]]
            graph.forward(IDS[:length], cache, bound)
            held = Use(cache.uses)
            cache.take(held)
            sampler = Sampler(logprobs=WantedLogprobs(0))  # needs all logits
            rows.append(Row(prompt, len(prompt), bound, 99, frozenset(), sampler, cache, held))
        steps = []
        for at in range(20, 36):
            if at == 30:
                rows[1] = rows.pop()  # row 1 leaves, and the last row takes its place
            for row, token in zip(rows, IDS[at:], strict=False):
                row.tokens.append(token)
            logits = buffers.step(rows)
            assert isinstance(logits, np.ndarray)
            steps.append(logits)
        return np.concatenate(steps)

    pair.require_close(batch)


# -- picks on the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 40, 127])
def test_the_largest_logits_of_a_step_are_those_of_the_whole_row(pair: Pair, captured: Graph, number: int) -> None:
    if pair.cuda.folder.best is None:
        assert pair.cuda.folder.kv.dtype != "f16"
        pytest.skip("the graph picks nothing on the device")
    for graph in (pair.cuda, captured):
        bound = graph.bind(pair.patch(4))
        cache = graph.new_cache(bound)
        held = Use(cache.uses)
        cache.take(held)
        graph.forward(IDS[:9], cache, bound, held=held)
        served = 0
        for token in IDS[9:30]:
            (best,) = graph.forward_best([token], cache, bound, best=number, last=1, held=held)
            del cache.tokens[-1]
            (whole,) = graph.forward([token], cache, bound, held=held)
            if isinstance(best, BestLogits):
                served += 1
                assert np.array_equal(whole[best.ids], best.values)
                assert best.ids.tolist() == np.flatnonzero(whole >= np.sort(whole)[-number]).tolist()
        assert served or number > 40  # with the tiny models' vocabulary of 320, ties may be many


def test_completions_picked_on_the_device_are_those_picked_from_all_logits(pair: Pair, captured: Graph) -> None:
    for graph in (pair.cuda, captured):
        for sampling in (Sampling(), Sampling(temperature=1.0, top_k=20, seed=1)):
            # A wish for log-probabilities changes no pick, and needs all logits.
            samplers = Sampler(sampling), Sampler(sampling, logprobs=WantedLogprobs(0))
            picked, wanted = (
                list(generate(graph, IDS[:9], graph.base, sampler=each, max_new_tokens=24, eos_ids=frozenset()))
                for each in samplers
            )
            assert picked == wanted


# -- captured steps ------------------------------------------------------------------------------------------


def test_decode_steps_are_captured_only_in_float16_exports(pair: Pair, captured: Graph) -> None:
    """CUDA's attention operator has no float32 kernel, so float32 graphs report why their steps are not captured."""
    is_f16 = pair.cuda.folder.kv.dtype == "f16"
    assert (captured.captured is not None, captured.capture_failure is None) == (is_f16, is_f16), (
        captured.capture_failure
    )
    print(f"\n{named(pair)}: captured: {captured.capture_failure or 'yes'}")


@pytest.mark.parametrize("rank", [None, 0, 3, 4, 16, 64, 65])
def test_captured_steps_give_the_logits_of_ordinary_steps(pair: Pair, captured: Graph, rank: int | None) -> None:
    patch = None if rank is None else pair.patch(rank)
    for chunks in (STEPS, (1,) * 48):
        pair.require_close(partial(patched_logits, patch=patch, chunks=chunks), captured)


def test_captured_steps_of_another_thread_give_the_same_logits(pair: Pair, captured: Graph) -> None:
    """The thread that opened the model and the one for all others have captures of their own."""
    if captured.captured is None:
        pytest.skip("only float16 exports capture their steps")
    patch = pair.patch(16)

    def elsewhere(graph: Graph) -> Logits:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(patched_logits, graph, patch, STEPS).result()

    for here in (patch, None):
        pair.require_close(elsewhere, captured)
        pair.require_close(partial(patched_logits, patch=here, chunks=STEPS), captured)


def test_captured_steps_read_patches_written_in_place(pair: Pair, captured: Graph) -> None:
    """Two patches of one bucket alternate, so a replay that kept the first patch's tensors would give wrong logits."""
    for seed in (1, 2, 1, 2):
        patch = pair.patch(16, seed=seed)
        pair.require_close(partial(patched_logits, patch=patch, chunks=STEPS), captured)


def test_captured_sequences_can_alternate_their_decode_steps(pair: Pair, captured: Graph) -> None:
    patches = [None, pair.patch(4), pair.patch(16)]

    def alternating(graph: Graph) -> Logits:
        bounds = [graph.bind(patch) for patch in patches]
        caches = [graph.new_cache(bound) for bound in bounds]
        logits = []
        for at in (0, *range(24, 48)):
            for bound, cache in zip(bounds, caches, strict=True):
                logits.append(graph.forward(IDS[at : at + 1 if at else 24], cache, bound))
        return np.concatenate(logits)

    pair.require_close(alternating, captured)


def test_a_kv_prefix_works_with_captured_steps(pair: Pair, captured: Graph) -> None:
    for patch in prefixed(pair):
        pair.require_close(partial(prefixed_logits, patch=patch), captured)


# -- times ---------------------------------------------------------------------------------------------------


def step_ms(graph: Graph, bound: BoundPatch) -> float:
    cache = graph.new_cache(bound)
    graph.forward(IDS, cache, bound)
    seconds = []
    for token in token_ids(64, seed=2):
        start = time.perf_counter()
        graph.forward([token], cache, bound)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds[8:])


def test_the_time_of_a_decode_step_is_recorded(pair: Pair, captured: Graph) -> None:
    times = {}
    for label, patch in (("base", None), ("rank 16", pair.patch(16))):
        times[label] = step_ms(pair.cuda, pair.cuda.bind(patch))
        if captured.captured is not None:
            times[f"{label} captured"] = step_ms(captured, captured.bind(patch))
    record(f"ms a step, {named(pair)}", times)


def test_the_time_of_a_switch_is_recorded(pair: Pair, captured: Graph) -> None:
    graph, times = pair.cuda, {}
    patches = {str(seed): pair.patch(16, seed=seed) for seed in (1, 2)}
    model = PatchedModel.from_pretrained(graph.folder.path, DEVICE)
    for name, patch in patches.items():
        model.load_patch(patch, name)
    times["bound"] = 1e3 * median(switch_seconds(model, list(patches)))
    if captured.captured is not None:
        bounds = [captured.bind(patch) for patch in patches.values()]
        seconds = []
        for number in range(50):
            bound = bounds[number % 2]
            start = time.perf_counter()
            captured.captured.switch(bound.key, bound.deltas)
            seconds.append(time.perf_counter() - start)
        times["in place"] = 1e3 * median(seconds)
    record(f"ms a switch, {named(pair)}", times)

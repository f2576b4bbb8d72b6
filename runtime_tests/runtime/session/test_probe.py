"""Probes: a patch passes only if it has the same effect on this machine as on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime_tests.logits import graph_logits, token_ids
from runtime_tests.patches import patch_for
from tp_runtime.errors import BaseMismatchError, PatchFormatError
from tp_runtime.patch import Patch
from tp_runtime.session import BoundPatch, Graph, ModelFolder, probe

IDS = token_ids(12)


@pytest.fixture(scope="module")
def graph(tiny_llama_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_llama_export), "cpu")


@pytest.fixture(scope="module")
def patch(graph: Graph) -> Patch:
    return patch_for(graph.folder, seed=1, scale=0.3)


def probed(patch: Patch, logits: Any, ids: list[int] = IDS, **changes: Any) -> Patch:
    """Return `patch` with a probe that is measured on `logits`."""
    return Patch(patch.deltas, replace(patch.config, probe={**probe.measure_probe(ids, logits), **changes}))


class FakeGraph:
    """A fake graph that returns the given logits for runs with a patch and for runs of the base."""

    def __init__(self, patched: Any, base: Any, precision: str) -> None:
        self.folder = SimpleNamespace(vocab_size=base.shape[1], context_window=64, precision=precision)
        self.logits = {"patch": patched, "base": base}

    def bind(self, patch: Patch | None) -> BoundPatch:
        return BoundPatch(dict, ("graph", ()) if patch is None else ("graph", patch.terms))

    def run(self, _tokens: Any, bound: BoundPatch) -> Any:
        return self.logits["patch" if bound.key[1] else "base"]


def test_a_probe_passes_after_saving_and_loading(graph: Graph, patch: Patch, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    probed(patch, graph_logits(graph, IDS, graph.bind(patch))).save(file)  # in f16, so the values are slightly rounded
    assert probe.check_probe(graph, Patch.load(file)).ok


def test_a_probe_contains_top1_and_logsumexp() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [1000.0, 0.0, 1000.0]], np.float32)
    assert probe.measure_probe([4, 5], logits) == {
        "token_ids": [4, 5],
        "top1": [1, 0],
        "top1_logits": [3.0, 1000.0],
        "logsumexp": [round(float(np.log(np.exp([1.0, 3.0, 2.0]).sum())), 5), round(1000 + float(np.log(2)), 5)],
    }


def test_the_probe_of_another_patch_fails(graph: Graph, patch: Patch) -> None:
    other = patch_for(graph.folder, seed=2, scale=0.3)
    for wrong in (other, 0.5 * patch, -patch, patch.truncate(1)):
        found = probe.check_probe(graph, probed(patch, graph_logits(graph, IDS, graph.bind(wrong))))
        assert found.live and not found.ok


def test_a_probe_of_the_base_fails(graph: Graph, patch: Patch) -> None:
    found = probe.check_probe(graph, probed(patch, graph_logits(graph, IDS)))
    assert found.live and not found.ok and found.max_logit_error_unpatched < 1e-4


def test_a_patch_without_a_probe_cannot_be_checked(graph: Graph, patch: Patch) -> None:
    for bare in (patch, 0.5 * probed(patch, graph_logits(graph, IDS))):
        with pytest.raises(PatchFormatError, match="no probe"):
            probe.check_probe(graph, bare)


def test_a_patch_that_does_not_fit_is_not_checked(graph: Graph, patch: Patch) -> None:
    good = probed(patch, graph_logits(graph, IDS, graph.bind(patch)))
    with pytest.raises(BaseMismatchError):
        probe.check_probe(graph, Patch(good.deltas, replace(good.config, base_digest="0" * 64)))


@pytest.mark.parametrize(
    "changes",
    [{"top1": [320] * 12}, {"top1": [10**30] * 12}, {"token_ids": [*IDS[:-1], 320]}, {"token_ids": [10**30] * 12}],
)
def test_a_probe_with_ids_of_another_vocabulary_is_refused(
    graph: Graph, patch: Patch, changes: dict[str, list[int]]
) -> None:
    with pytest.raises(PatchFormatError) as error:
        probe.check_probe(graph, probed(patch, graph_logits(graph, IDS), **changes))
    assert error.value.field == "config.probe" and "320" in str(error.value.wanted)


def test_a_probe_longer_than_the_context_window_is_refused(graph: Graph, patch: Patch) -> None:
    window = graph.folder.context_window
    ids = token_ids(window)
    long = {key: values * 2 for key, values in probe.measure_probe(ids, graph_logits(graph, ids)).items()}
    with pytest.raises(PatchFormatError, match=r"config\.probe"):
        probe.check_probe(graph, Patch(patch.deltas, replace(patch.config, probe=long)))


def test_figures_too_large_for_a_float_fail_the_probe_without_an_error(graph: Graph, patch: Patch) -> None:
    wild = probed(patch, graph_logits(graph, IDS), logsumexp=[10**300] * 12)
    assert not probe.check_probe(graph, wild).ok


# -- defective and inaccurate graphs -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_graph_that_ignores_its_slots_is_detected(patch: Patch, precision: str) -> None:
    base = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    ids = list(range(12))
    dead: Any = FakeGraph(base, base, precision)
    shifted = base.copy()
    shifted[:, 3] += 9
    for host in (shifted, base):  # even if the host's logits are those of the base
        found = probe.check_probe(dead, probed(patch, host, ids))
        assert not found.live and not found.ok


@pytest.mark.parametrize(
    ("precision", "error", "ok"),
    [("fp32", 4e-3, True), ("fp32", 6e-3, False), ("fp16", 0.2, True), ("fp16", 0.3, False), ("int8", 3.0, True)],
)
def test_the_tolerance_of_a_probe_depends_on_the_precision(
    patch: Patch, precision: str, error: float, ok: bool
) -> None:
    host = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    base = np.random.default_rng(1).standard_normal((12, 40)).astype(np.float32) + 9
    graph: Any = FakeGraph(host + np.float32(error), base, precision)
    found = probe.check_probe(graph, probed(patch, host, list(range(12))))
    assert found.live and found.ok is ok and found.max_logit_error == pytest.approx(error, rel=1e-2)


def test_on_a_quantised_graph_the_patch_must_bring_the_logits_nearer_to_the_hosts(patch: Patch) -> None:
    host = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    for patched, base, ok in ((host + 1, host + 2, True), (host + 2, host + 1, False)):
        graph: Any = FakeGraph(patched, base, "int4")
        assert probe.check_probe(graph, probed(patch, host, list(range(12)))).ok is ok


def test_top1_agreement_is_the_share_of_positions_that_agree(patch: Patch) -> None:
    host = np.zeros((4, 8), np.float32)
    host[:, 2] = 5
    device = host.copy()
    device[0, 6] = 9
    graph: Any = FakeGraph(device, host * 0, "fp32")
    found = probe.check_probe(graph, probed(patch, host, [1, 2, 3, 4]))
    assert found.top1_agreement == 0.75 and not found.ok

"""Probes: a patch that does here what it did on the host passes, everything else does not."""

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
    """`patch` with a probe measured on `logits`."""
    return Patch(patch.deltas, replace(patch.config, probe={**probe.measure_probe(ids, logits), **changes}))


class FakeGraph:
    """Returns given logits for the patched and the base run."""

    def __init__(self, patched: Any, base: Any, precision: str) -> None:
        self.folder = SimpleNamespace(vocab_size=base.shape[1], context_window=64, precision=precision)
        self.logits = {"patch": patched, "base": base}

    def bind(self, patch: Patch | None) -> BoundPatch:
        return BoundPatch({}, ("graph", ()) if patch is None else ("graph", patch.terms))

    def run(self, _tokens: Any, bound: BoundPatch) -> Any:
        return self.logits["patch" if bound.key[1] else "base"]


def test_a_probe_survives_the_file(graph: Graph, patch: Patch, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    probed(patch, graph_logits(graph, IDS, graph.bind(patch))).save(file)  # f16: the values are rounded, a little
    assert probe.check_probe(graph, Patch.load(file)).ok


def test_the_measures_are_top1_and_logsumexp() -> None:
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


def test_no_probe(graph: Graph, patch: Patch) -> None:
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
def test_ids_of_another_vocabulary(graph: Graph, patch: Patch, changes: dict[str, list[int]]) -> None:
    with pytest.raises(PatchFormatError) as error:
        probe.check_probe(graph, probed(patch, graph_logits(graph, IDS), **changes))
    assert error.value.field == "config.probe" and "320" in str(error.value.wanted)


def test_a_probe_longer_than_the_window(graph: Graph, patch: Patch) -> None:
    window = graph.folder.context_window
    ids = token_ids(window)
    long = {key: values * 2 for key, values in probe.measure_probe(ids, graph_logits(graph, ids)).items()}
    with pytest.raises(PatchFormatError, match=r"config\.probe"):
        probe.check_probe(graph, Patch(patch.deltas, replace(patch.config, probe=long)))


def test_figures_too_large_for_an_array_of_floats_fail_and_nothing_else(graph: Graph, patch: Patch) -> None:
    wild = probed(patch, graph_logits(graph, IDS), logsumexp=[10**300] * 12)
    assert not probe.check_probe(graph, wild).ok


# -- what no healthy graph does ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_slots_that_are_ignored_are_found_out(patch: Patch, precision: str) -> None:
    base = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    ids = list(range(12))
    dead: Any = FakeGraph(base, base, precision)
    shifted = base.copy()
    shifted[:, 3] += 9
    for host in (shifted, base):  # even where the host's logits are those of the base
        found = probe.check_probe(dead, probed(patch, host, ids))
        assert not found.live and not found.ok


@pytest.mark.parametrize(
    ("precision", "error", "ok"),
    [("fp32", 4e-3, True), ("fp32", 6e-3, False), ("fp16", 0.2, True), ("fp16", 0.3, False), ("int8", 3.0, True)],
)
def test_how_far_off_is_rounding(patch: Patch, precision: str, error: float, ok: bool) -> None:
    host = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    base = np.random.default_rng(1).standard_normal((12, 40)).astype(np.float32) + 9
    here: Any = FakeGraph(host + np.float32(error), base, precision)
    found = probe.check_probe(here, probed(patch, host, list(range(12))))
    assert found.live and found.ok is ok and found.max_logit_error == pytest.approx(error, rel=1e-2)


def test_on_a_quantised_graph_the_patch_has_to_bring_the_host_nearer(patch: Patch) -> None:
    host = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    for patched, base, ok in ((host + 1, host + 2, True), (host + 2, host + 1, False)):
        graph: Any = FakeGraph(patched, base, "int4")
        assert probe.check_probe(graph, probed(patch, host, list(range(12)))).ok is ok


def test_agreement_is_a_share_of_positions(patch: Patch) -> None:
    host = np.zeros((4, 8), np.float32)
    host[:, 2] = 5
    here = host.copy()
    here[0, 6] = 9
    graph: Any = FakeGraph(here, host * 0, "fp32")
    found = probe.check_probe(graph, probed(patch, host, [1, 2, 3, 4]))
    assert found.top1_agreement == 0.75 and not found.ok

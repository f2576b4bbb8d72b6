"""The edge half compared with torch: a probe that was measured with torch."""

from __future__ import annotations

from pathlib import Path

from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.runtime.session.test_probe import IDS, graph, patch, probed
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, probe

__all__ = ["graph", "patch"]  # pytest finds these fixtures by their names here


def test_a_probe_measured_with_torch_passes_on_the_graph(graph: Graph, patch: Patch, tiny_llama: Path) -> None:
    logits = torch_logits(load_model(open_source(tiny_llama)), IDS, patch)
    found = probe.check_probe(graph, probed(patch, logits))
    assert found.ok and found.live and found.top1_agreement == 1
    assert found.max_logit_error < 1e-4 < 0.1 < found.max_logit_error_unpatched
    assert found.to_dict()["ok"] is True and len(found.to_dict()) == 5

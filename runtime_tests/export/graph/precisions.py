"""What the tests of precisions share: ids, calibration texts, and the logits and divergence of folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import token_ids
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

IDS = token_ids(40)
TEXTS = [token_ids(48, seed=seed) for seed in range(6)]  # to calibrate on
QUESTIONS = [f"What is {a} and {b}?" for a in "abcdef" for b in "uvw"]


def logits(folder: Path, patch: Patch | None = None) -> torch.Tensor:
    """Return the logits of IDS, through a folder's graph on the CPU."""
    graph = Graph(ModelFolder.open(folder), "cpu")
    return torch.from_numpy(graph.run(IDS, graph.bind(patch)))


def model_logits(model: Any) -> torch.Tensor:
    """Return the logits of IDS, through a torch model with its present weights."""
    return torch.from_numpy(torch_logits(model, IDS))


def divergence(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Return the mean KL divergence of two sets of logits, in nats per token."""
    p, q = wanted.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())

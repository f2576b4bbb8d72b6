"""Mixtures of experts in a form that can be traced.

transformers loops over the experts that some token chose, which makes the graph depend on the data. Here every expert
runs, on the rows that chose it and on no others (possibly none): the same numbers, and the same work at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import blocks_of


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The forward of MixtralSparseMoeBlock and Qwen3MoeSparseMoeBlock; z [b, T, d] -> o [b, T, d], router logits."""
    z = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = self.gate(z)
    weights, chosen = torch.topk(logits.softmax(-1, dtype=torch.float), self.top_k)
    if getattr(self, "norm_topk_prob", True):  # Mixtral always does
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(z)
    for i, expert in enumerate(self.experts):
        row, place = torch.nonzero(chosen == i, as_tuple=True)
        out = out.index_add(0, row, expert(z[row]) * weights[row, place, None].to(z.dtype))
    return out.reshape(hidden_states.shape), logits


@contextmanager
def traceable_experts(model: nn.Module) -> Iterator[None]:
    """Within the context the mixtures of experts of `model` compute without data-dependent control flow."""
    mixtures: list[Any] = [block.mlp for block in blocks_of(model) if block.router is not None]
    for mixture in mixtures:
        mixture.forward = MethodType(_forward, mixture)
    try:
        yield
    finally:
        for mixture in mixtures:
            del mixture.forward

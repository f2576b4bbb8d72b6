"""Make mixtures of experts traceable.

transformers loops over the experts that at least one token chose, so the traced graph would depend on the data. This
module runs every expert, but only on the rows that chose it, of which there may be none. The results and the work at
run time are the same.
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
    """Replace the forward of MixtralSparseMoeBlock and Qwen3MoeSparseMoeBlock.

    Args:
        hidden_states: z, what the mixture reads, [b, T, d].

    Returns:
        The mixture's output o, [b, T, d], and the router logits.
    """
    z = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = self.gate(z)
    weights, chosen = torch.topk(logits.softmax(-1, dtype=torch.float), self.top_k)
    if getattr(self, "norm_topk_prob", True):  # Mixtral always normalises
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(z)
    for i, expert in enumerate(self.experts):
        row, place = torch.nonzero(chosen == i, as_tuple=True)
        out = out.index_add(0, row, expert(z[row]) * weights[row, place, None].to(z.dtype))
    return out.reshape(hidden_states.shape), logits


@contextmanager
def traceable_experts(model: nn.Module) -> Iterator[None]:
    """Make the mixtures of experts of `model` compute without data-dependent control flow within the context."""
    mixtures: list[Any] = [block.mlp for block in blocks_of(model) if block.router is not None]
    for mixture in mixtures:
        mixture.forward = MethodType(_forward, mixture)
    try:
        yield
    finally:
        for mixture in mixtures:
            del mixture.forward

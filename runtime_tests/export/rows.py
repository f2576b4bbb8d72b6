"""This module makes the rows that a form is fitted on without a rollout, and a ridge fit of rows given all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_export.fit.forms import Rows
from tp_export.fit.ridge import AffineMap, Moments


def some_rows(model: Any, count: int) -> Rows:
    """Return a random student v [count, d], a teacher near it, and a random sink [1, d], for a sequential model."""
    g = torch.Generator().manual_seed(1)
    d = model.config.hidden_size
    student = torch.randn(count, d, generator=g)
    return Rows(student + 0.3 * torch.randn(count, d, generator=g), student, torch.randn(1, d, generator=g))


def fit_affine(
    inputs: Tensor, targets: Tensor, ridge: float, sink: Tensor | None = None, bias: bool = True
) -> AffineMap:
    """Return the ridge solution for inputs a [N, n] and targets d [N, m]."""
    moments = Moments(sink, bias)
    moments.add(inputs, targets)
    return moments.solve(ridge)

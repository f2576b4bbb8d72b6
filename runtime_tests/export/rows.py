"""Rows that a form is fitted on, without any rollout, and a ridge fit of rows that are all at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_export.fit.forms import Rows
from tp_export.fit.ridge import AffineMap, Moments


def some_rows(model: Any, count: int) -> Rows:
    """A random student and a teacher near it, of a sequential model: v [count, d], and a sink."""
    g = torch.Generator().manual_seed(1)
    d = model.config.hidden_size
    student = torch.randn(count, d, generator=g)
    return Rows(student + 0.3 * torch.randn(count, d, generator=g), student, torch.randn(1, d, generator=g))


def fit_affine(
    inputs: Tensor, targets: Tensor, ridge: float, sink: Tensor | None = None, bias: bool = True
) -> AffineMap:
    """The ridge solution for inputs a [N, n] and targets d [N, m]."""
    moments = Moments(sink, bias)
    moments.add(inputs, targets)
    return moments.solve(ridge)

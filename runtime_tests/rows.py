"""Rows that a form is fitted on, without any rollout."""

from __future__ import annotations

from typing import Any

import torch

from tp_export.fit.forms import Rows


def some_rows(model: Any, count: int) -> Rows:
    """A random student and a teacher near it, of a sequential model: v [count, d], and a sink."""
    g = torch.Generator().manual_seed(1)
    d = model.config.hidden_size
    student = torch.randn(count, d, generator=g)
    return Rows(student + 0.3 * torch.randn(count, d, generator=g), student, torch.randn(1, d, generator=g))

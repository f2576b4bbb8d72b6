"""The factor that GPTQ passes errors on with (Frantar et al., arXiv:2210.17323), for weights and for entries."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(hessian: Tensor, ridge: float) -> Tensor:
    """Return H + l I in float64, which is positive definite.

    Args:
        hessian: H, [m, m].
        ridge: l relative to the mean of H's diagonal, because few rows leave directions without any row. If H is zero,
            l is 1.
    """
    found = hessian.double()
    mean = float(found.diagonal().mean())
    return found + torch.eye(len(found), dtype=found.dtype, device=found.device) * (ridge * mean or 1.0)


def inverse_factor(hessian: Tensor, ridge: float) -> Tensor:
    """Return the upper triangular U of (H + l I)^-1 = U^T U, in float64; see `damped` for H and l."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, ridge)))
    return torch.linalg.cholesky(inverse, upper=True)

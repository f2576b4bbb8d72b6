"""A damped Hessian, and the factor that GPTQ passes errors on with (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(hessian: Tensor, ridge: float) -> Tensor:
    """Return H + l I in float64; it is positive definite if H is a sum of x x^T.

    Args:
        hessian: H, [m, m].
        ridge: l relative to the mean of H's diagonal, because few rows leave directions without any row. If H is zero,
            l is 1.
    """
    own = hessian.double()
    mean = float(own.diagonal().mean())
    return own + torch.eye(len(own), dtype=own.dtype, device=own.device) * (ridge * mean or 1.0)


def inverse_factor(definite: Tensor) -> Tensor:
    """Return the upper triangular U of H^-1 = U^T U, for a positive definite H [m, m], such as `damped` returns."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(definite))
    return torch.linalg.cholesky(inverse, upper=True)

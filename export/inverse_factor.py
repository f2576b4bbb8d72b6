"""The factor that GPTQ passes errors on with (Frantar et al., arXiv:2210.17323), for weights and for entries."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_factor(hessian: Tensor, ridge: float) -> Tensor:
    """Return the upper triangular U of (H + l I)^-1 = U^T U, in float64.

    Args:
        hessian: H, [m, m].
        ridge: l relative to the mean of H's diagonal, because few rows leave directions without any row. If H is zero,
            l is 1.
    """
    damped = hessian.double()
    mean = float(damped.diagonal().mean())
    damped = damped + torch.eye(len(damped), dtype=damped.dtype, device=damped.device) * (ridge * mean or 1.0)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)

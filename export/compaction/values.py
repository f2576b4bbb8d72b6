"""Values: what the kept entries of one head have to hold so that the head's output stays the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_values(shares: Tensor, missing: Tensor, values: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Solve min_v sum_i w_i |P_i v - target_i|^2 + l |v - v_0|^2 for all components at once.

        (P^T W P + l I) (v - v_0) = P^T W (target - P v_0),   l = ridge * mean diagonal

    Args:
        shares: the shares of the kept entries, P [M, p].
        missing: target - P v_0, what the head's output lacks with the values v_0, [M, head dim].
        values: the values v_0 that the ridge pulls to, [p, head dim].
        weight: the weight of each row, w [M].
        ridge: the ridge, relative to the mean diagonal.

    Returns:
        The fitted values v, [p, head dim].
    """
    weighted = shares * weight[:, None]
    gram = (weighted.T @ shares).double()
    gram += (
        ridge * gram.diagonal().mean().clamp(min=1e-300) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    return values + torch.linalg.solve(gram, (weighted.T @ missing).double()).to(values.dtype)

"""Mass: how much each kept entry has to stand for besides itself, folded into its key.

The kept entries have to draw the same share of attention as all of the context did, or the text would get the rest. A
factor w_j on the exponential of an entry's logit would do that, and beta_j = log w_j could be added to the logit as a
bias. The fold puts it into the key instead, so that the runtime needs no bias: u is the direction with q u = 1 for the
rows that look at the entries, and key_j + beta_j u has the logit s_ij + beta_j there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST, _MOST = 0.05, 200.0  # the bounds of a factor
_STEPS = 400
_KEY_RIDGE = 1e-2


def mass_factors(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """Solve min_w |P_S w - m|^2 + l |w - 1|^2 with 0.05 <= w_j <= 200, by accelerated projected gradient.

    Args:
        gram: the Gram matrix of the kept entries' shares, P_S^T P_S, [p, p].
        moment: P_S^T m, [p], where m_i is the share of the whole context in row i.
        ridge: l relative to the mean diagonal of `gram`.

    Returns:
        The factors w [p], in the dtype of `gram`.
    """
    a, b = gram.double(), moment.double()
    ridge = max(ridge * float(a.diagonal().mean()), 1e-300)  # entries that no row sees get the factor 1
    a, b = a + ridge * torch.eye(len(a), dtype=a.dtype, device=a.device), b + ridge
    scale = a.diagonal().clamp(min=1e-300).rsqrt()  # with a unit diagonal one step length suits every coordinate
    a, b = a * scale[:, None] * scale, b * scale
    step = 1 / torch.linalg.matrix_norm(a, 2)
    low, high = _LEAST / scale, _MOST / scale
    x = (1 / scale).clamp(low, high)
    y, t = x, 1.0
    for _ in range(_STEPS):
        new = (y - step * (a @ y - b)).clamp(low, high)
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, x, t = new + (t - 1) / following * (new - x), new, following
    return (x * scale).to(gram.dtype)


def fold_direction(query: Tensor, attention: Tensor, scale: float) -> Tensor:
    """Return u [head dim] with scale * q_i u = 1 where the rows look at the entries, by weighted ridge regression.

        (Q^T D Q + l I) u = Q^T D 1,   Q = scale * q,   l = 0.01 of the mean diagonal

    Args:
        query: the queries q [M, head dim].
        attention: the diagonal of D [M]: sum over the kept entries of P_ij^2, times the weight of the row.
        scale: the factor of the logits.
    """
    rows = (query * scale).double()
    weighted = rows * attention.double()[:, None]
    gram = weighted.T @ rows
    ridge = _KEY_RIDGE * gram.diagonal().mean().clamp(min=1e-300)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * identity, weighted.sum(0)).to(query.dtype)


def fold(keys: Tensor, factors: Tensor, direction: Tensor) -> Tensor:
    """Return key_j + log(w_j) u, [p, head dim]."""
    return keys + factors.log()[:, None] * direction

"""Joint values: the values of all heads of a layer together, towards the residual stream behind the output projection.

Heads are fitted one by one first (values.py). Their errors add up in the residual stream, and there they can cancel:

    minimise over dv   sum_i w_i |rest_i - W_O (P_i dv)|^2 + l |dv|^2

P_i dv stacks, for the query heads h of row i, the shares of the entries of the head's key/value head times their dv.
The normal equations are solved by conjugate gradients from dv = 0. Their matrix is applied through two Gram matrices,
that of the shares [heads p, heads p] and W_O^T W_O, so a step does not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 40


def fit_joint(shares: Tensor, rest: Tensor, projection: Tensor, kv_heads: int, weight: Tensor, ridge: float) -> Tensor:
    """Return what to add to the values of all key/value heads, dv [kv heads, p, head dim].

    Args:
        shares: the shares of the kept entries for every query head, P [N, heads, p].
        rest: what the residual stream still lacks, [N, d].
        projection: the output projection W_O, [d, heads * head dim].
        kv_heads: the number of key/value heads; query heads share them in order.
        weight: the weight of each token, w [N].
        ridge: l relative to the mean diagonal of the normal equations' matrix.
    """
    tokens, heads, count = shares.shape
    size, group = projection.shape[1] // heads, heads // kv_heads
    flat = (shares * weight.sqrt()[:, None, None]).reshape(tokens, heads * count)
    gram = (flat.T @ flat).view(heads, count, heads * count)
    outputs = (projection.T @ projection).view(heads, size, heads * size)
    back = ((rest * weight[:, None]) @ projection).view(tokens, heads, size)
    wanted = torch.einsum("nhp,nhd->hpd", shares, back).view(kv_heads, group, count, size).sum(1)
    # The mean of the diagonal over heads, entries and components is a sum over pairs of query heads that share values.
    same = torch.arange(heads, device=flat.device) // group
    pairs = (same[:, None] == same[None]).to(flat.dtype)
    diagonal = torch.einsum("hjgj->hg", gram.view(heads, count, heads, count)) / count
    diagonal = diagonal * torch.einsum("hcgc->hg", outputs.view(heads, size, heads, size)) / size
    shrink = ridge * float((diagonal * pairs).sum()) / kv_heads

    def apply(x: Tensor) -> Tensor:
        seen = (x.repeat_interleave(group, 0) @ outputs).view(heads, count, heads, size)
        stacked = seen.permute(2, 0, 1, 3).reshape(heads, heads * count, size)
        return (gram @ stacked).view(kv_heads, group, count, size).sum(1) + shrink * x

    return _conjugate_gradients(apply, wanted)


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Return x after a fixed number of steps towards apply(x) = wanted, from zero."""
    x, rest = torch.zeros_like(wanted), wanted
    direction, error = rest, rest.square().sum()
    for _ in range(_STEPS):
        if float(error) <= 1e-14 * float(wanted.square().sum()):
            break
        image = apply(direction)
        length = error / (direction * image).sum()
        x, rest = x + length * direction, rest - length * image
        before, error = error, rest.square().sum()
        direction = rest + error / before * direction
    return x

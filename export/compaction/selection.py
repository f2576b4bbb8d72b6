"""Selection: which entries of the context a head keeps.

`select_seen` ranks each entry by itself. `select_forward` takes one entry after another, each time the one that
explains most of what those before it leave unexplained: entries that the same rows look at can stand in for each other,
and a document of many facts has more entries that some row looks at closely than there is room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CANDIDATES = 3  # times the number of entries to keep, the most seen ones, among which the forward selection chooses


def select_seen(shares: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return the entries with the largest root mean square share, sum_i w_i P_ij^2, in order of position.

    A mean share would keep what many rows look at a little. The square keeps what some rows look at closely, which is
    where an entry's own value matters.

    Args:
        shares: the shares of all entries of the context, P [M, n].
        weight: the weight of each row, w [M].
        count: the number of entries to keep, at most n.

    Returns:
        The indices of the kept entries, [count].
    """
    return (weight @ shares.square()).topk(count).indices.sort().values


def select_forward(shares: Tensor, weight: Tensor, values: Tensor, count: int) -> Tensor:
    """Return entries whose shares explain the head's output and the context's share, in order of position.

    In each step the entry j is added that most reduces, with X refitted,

        sum_i w_i |P_i B - P_S,i X|^2        B = [V, c 1],  c^2 = sum_i w_i |P_i V|^2 / sum_i w_i (P_i 1)^2

    With the residual r_j = P_j - (its projection on the shares of S), that is the j with the largest
    |r_j^T W P B|^2 / r_j^T W r_j. The residuals are not formed: a Cholesky factor of the Gram matrix of S grows by a
    column in each step.

    Args:
        shares: the shares of all entries of the context, P [M, n].
        weight: the weight of each row, w [M].
        values: the values of all entries, V [n, head dim].
        count: the number of entries to keep, at most n.

    Returns:
        The indices of the kept entries, [count].
    """
    candidates = select_seen(shares, weight, min(_CANDIDATES * count, shares.shape[1]))
    output, mass = shares @ values, shares.sum(1)
    scale = ((weight @ output.square()).sum() / (weight @ mass.square()).clamp(min=1e-30)).sqrt()
    wanted = torch.cat([output, scale * mass[:, None]], 1)
    seen = shares[:, candidates]
    weighted = seen * weight[:, None]
    return candidates[_forward((weighted.T @ seen).double(), (weighted.T @ wanted).double(), count)].sort().values


def _forward(gram: Tensor, moment: Tensor, count: int) -> Tensor:
    """Return `count` columns in the order of their choice, from the Gram matrix [n, n] and the moments [n, d]."""
    rest = gram.diagonal().clone()  # r_j^T W r_j
    least = 1e-7 * rest.mean().clamp(min=1e-300)  # below it a column is a combination of chosen ones, up to rounding
    moment = moment.clone()
    free = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    factor = gram.new_zeros(len(gram), count)
    chosen: list[int] = []
    for step in range(count):
        gain = torch.where(rest > least, moment.square().sum(1) / rest.clamp(min=least), rest - least)
        best = int(torch.where(free, gain, -torch.inf).argmax())
        if rest[best] > least:
            column = (gram[:, best] - factor[:, :step] @ factor[best, :step]) / rest[best].sqrt()
            factor[:, step] = column
            moment -= torch.outer(column, moment[best] / column[best])
            rest -= column.square()
        chosen.append(best)
        free[best] = False
    return torch.tensor(chosen, device=gram.device)

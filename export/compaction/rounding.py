"""Rounding: keys and values as the file stores them, so that what the rows see of them changes least.

GPTQ (Frantar et al., arXiv:2210.17323) rounds the lines of a matrix X one after another, and passes the error of each
on to the lines that are not rounded yet, where the Hessian H says that they can make up for it. It goes through

    min_X'  tr (X - X')^T H (X - X')        X' from the numbers that the file can hold

For the keys of a head the lines are the channels, and H = Q^T D Q says how much the logits of the rows move. For the
values the lines are the entries, and H = P^T W P says how much the heads' outputs move.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..decoder import Entry
from ..inverse_factor import damped, inverse_factor

Rounding = Callable[[Tensor], Tensor]
"""A function that rounds lines [..., k] to what a file holds: a channel of the keys of all entries, or all channels of
the value of one entry."""


def unrounded(lines: Tensor) -> Tensor:
    """Return lines as they are: the rounding of a file that holds every number."""
    return lines


def round_lines(lines: Tensor, hessian: Tensor, ridge: float, rounding: Rounding) -> Tensor:
    """Round a matrix line by line, the lines that matter most first.

    Args:
        lines: X, [m, k].
        hessian: H, [m, m].
        ridge: what is added to the diagonal of H, relative to its mean.
        rounding: the rounding of a line.

    Returns:
        X', [m, k].
    """
    if rounding is unrounded:
        return lines
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(damped(hessian[order][:, order], ridge)).to(lines)
    rest, found = lines[order], torch.empty_like(lines)
    for i, place in enumerate(order.tolist()):
        found[place] = rounding(rest[i])
        error = (rest[i] - found[place]) / factor[i, i]
        rest[i + 1 :] -= factor[i, i + 1 :, None] * error
    return found


def round_entry(entry: Entry, rounding: Rounding) -> Entry:
    """Return keys and values [kv heads, n, head dim] as the file holds them, each line rounded for itself."""
    keys, values = entry
    return rounding(keys.transpose(1, 2)).transpose(1, 2), rounding(values)

"""Selection: which entries of the context a head keeps."""

from __future__ import annotations

from torch import Tensor


def select(shares: Tensor, weight: Tensor, count: int) -> Tensor:
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

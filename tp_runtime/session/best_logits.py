"""The largest logits of one position, which suffice for some picks; the others stay on the device.

A graph for decode steps on a device returns some of the largest logits (`ModelFolder.best`). Which of several equal
logits are among them differs between kernels. So they serve a pick only if all logits that the pick depends on are
certainly among them, and they are put in the order of the vocabulary: a pick among them is then the pick among all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BestLogits:
    """All logits of a position that are at least as large as its n-th largest one, for some n.

    Attributes:
        ids: their ids, ascending [n or more].
        values: the logits [n or more], float32 and finite.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


def best_logits(
    values: NDArray[np.floating], ids: NDArray[np.int64], number: int, vocab_size: int
) -> BestLogits | None:
    """Return all logits that are at least as large as the `number`-th largest one; None if they are not all known.

    Args:
        values: some of the largest logits of one position [best], in any order.
        ids: their ids [best].
        number: the number of the largest logits that are wanted, at least 1.
        vocab_size: the number of all logits.
    """
    best = len(values)
    if number > best:
        return None
    values = values.astype(np.float32)
    least = values.max() if number == 1 else np.partition(values, best - number)[best - number]
    # The logits that were left out are at most as large as the smallest of these; one of them may equal `least`.
    known = best == vocab_size or values.min() < least
    if not known or not np.isfinite(least) or not np.isfinite(values.max()):
        return None  # an overflow or a NaN needs the row, as `finite` of the sampler does
    kept = values >= least
    ids, values = ids[kept], values[kept]
    order = ids.argsort()
    return BestLogits(ids[order], values[order])

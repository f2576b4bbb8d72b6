"""The standard error of a ratio of sums over queries, by bootstrap.

A gap closed is such a ratio: the KL of the patched model summed over all tokens of all queries, divided by that of the
unpatched one. So is a share of answers kept. The tokens of one answer depend on each other, so whole queries are drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 1000
_SEED = 0


def ratio_error(numerators: ArrayLike, denominators: ArrayLike, draws: int = DRAWS) -> float | None:
    """Return the bootstrap standard error of sum(numerators) / sum(denominators).

    Each draw takes n of the n queries with replacement and computes the ratio of their sums. The error is the standard
    deviation of the draws' ratios. The draws are the same in every run. A draw whose denominators sum to zero has no
    ratio and is left out.

    Args:
        numerators: one number for each query, [n].
        denominators: one number >= 0 for each query, [n]; ones make the ratio a mean.
        draws: the number of draws.

    Returns:
        The standard error, in the unit of the ratio; None for fewer than two queries with a denominator above zero,
        since nothing is known of the spread then.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if np.count_nonzero(bottom) < 2:
        return None
    n = len(top)
    # How often each draw takes each query, [draws, n].
    taken = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=draws)
    sums = taken @ bottom
    found = sums > 0
    return float(np.std((taken @ top)[found] / sums[found]))

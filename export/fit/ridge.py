"""Centred ridge regression in closed form, with the rank truncated in the metric of the map's outputs.

    min_M |M a_t - d_t|^2 + l |M|^2,   l = ridge * mean(diag G),   G = sum_t a_t a_t^T   (a, d centred)

The solve is a Cholesky factorisation of G + l I (n x n). If there are no more rows than inputs, it uses the N x N dual
instead. All computation is in float64, because a Gram matrix squares the condition number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The least penalty. Rows that are all equal have a Gram matrix of zero, and the map is then zero.
_TINY = torch.finfo(torch.float64).tiny
# The least relative ridge. With less, directions that no row has, such as the sink's, make the Gram matrix singular.
_MIN_RIDGE = 1e-10


@dataclass(frozen=True)
class AffineMap:
    """A map a -> M a + bias that is fitted on rows.

    Attributes:
        matrix: the matrix M [m, n], float64.
        energy: the matrix M (G + l I) M^T [m, m], the metric in which directions are ranked.
        mean_in: the mean of the inputs [n].
        mean_out: the mean of the targets [m].
    """

    matrix: Tensor
    energy: Tensor
    mean_in: Tensor
    mean_out: Tensor


class Moments:
    """Gathers, one batch at a time, the statistics of the rows that a ridge regression needs.

    While there are no more rows than inputs, the rows themselves are kept for the dual. After that they are folded into
    the n x n Gram matrix, so that memory does not grow with the number of rows.

    Args:
        sink: the activation s of the attention sink at this site [n]. Its direction is taken out of the inputs first,
            so that the map is exactly zero on it (M s = 0) and optimal among such maps.
        bias: whether the map has a bias. If not, the rows are not centred, both means are reported as zero, and M a is
            the whole fit.
    """

    def __init__(self, sink: Tensor | None = None, bias: bool = True) -> None:
        self._bias = bias
        self._sink = None if sink is None else sink.double() / sink.double().norm()
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._held = 0
        self._count = 0
        # The sums of a and d over the folded rows, and their raw second moments a^T a and a^T d.
        self._folded: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows a [k, n] and their targets d [k, m]."""
        a, d = inputs.double(), targets.double()
        self._rows.append((a, d))
        self._held += len(a)
        self._count += len(a)
        if self._held > a.shape[1]:
            self._fold()

    def _projected(self, a: Tensor) -> Tensor:
        return a if self._sink is None else a - torch.outer(a @ self._sink, self._sink)

    def _fold(self) -> None:
        for a, d in self._rows:
            p = self._projected(a)
            new = (a.sum(0), d.sum(0), p.T @ p, p.T @ d)
            if self._folded is not None:
                new = tuple(x + y for x, y in zip(self._folded, new, strict=True))  # type: ignore[assignment]
            self._folded = new
        self._rows, self._held = [], 0

    def solve(self, ridge: float) -> AffineMap:
        """Solve the ridge regression of the targets on the inputs.

        The rows are centred if there is a bias, which then takes the means.

        Args:
            ridge: the penalty, relative to the mean diagonal of the Gram matrix.

        Returns:
            The fitted map.
        """
        if self._folded is not None:
            self._fold()
            return self._primal(ridge)
        a, d = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        mean_in, mean_out = self._bias * a.mean(0), self._bias * d.mean(0)
        a, d = self._projected(a - mean_in), d - mean_out
        gram = a @ a.T
        penalty = (max(ridge, _MIN_RIDGE) * gram.trace() / a.shape[1]).clamp(min=_TINY)
        x = torch.linalg.solve_ex(gram + penalty * torch.eye(len(a), dtype=a.dtype, device=a.device), d)[0]
        # M = X^T A, so the energy M (G + l I) M^T = D^T A M^T is D^T (A A^T) X.
        return AffineMap(x.T @ a, _symmetric(d.T @ (gram @ x)), mean_in, mean_out)

    def _primal(self, ridge: float) -> AffineMap:
        assert self._folded is not None
        sum_in, sum_out, gram, cross = self._folded
        mean_in, mean_out = self._bias * sum_in / self._count, self._bias * sum_out / self._count
        centre = self._projected(mean_in[None])
        gram = gram - self._count * centre.T @ centre
        cross = cross - self._count * centre.T @ mean_out[None]
        penalty = (max(ridge, _MIN_RIDGE) * gram.trace() / len(gram)).clamp(min=_TINY)
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        solved = torch.cholesky_solve(cross, factor)  # M^T [n, m]
        # M (G + l I) = D^T A, hence M (G + l I) M^T = (A^T D)^T M^T without a further n x n product.
        return AffineMap(solved.T, _symmetric(cross.T @ solved), mean_in, mean_out)


def _symmetric(energy: Tensor) -> Tensor:
    return (energy + energy.T) / 2


def top_directions(energy: Tensor, rank: int) -> Tensor:
    """Return orthonormal columns U [m, rank]: the directions of largest energy, in descending order."""
    values, vectors = torch.linalg.eigh(energy)
    return vectors[:, values.argsort(descending=True)[:rank]]


def share_kept(energy: Tensor, directions: Tensor) -> float:
    """Return tr(U^T E U) / tr(E) for orthonormal columns U [m, r] and a matrix E [m, m].

    The value 1 means that everything is kept; the function also returns 1 if E is zero.
    """
    total = energy.trace()
    return float((directions * (energy @ directions)).sum() / total) if total > 0 else 1.0

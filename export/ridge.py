"""Closed-form ridge regression, centred, with rank truncation in the metric of what the map outputs.

    min_M |M a_t - d_t|^2 + l |M|^2,   l = ridge * mean(diag G),   G = sum_t a_t a_t^T   (a, d centred)

The solve is a Cholesky of G + l I (n x n) or, where there are fewer rows than inputs, of its N x N dual. All of it in
float64: a Gram squares the condition number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AffineMap:
    """a -> M a + bias, fitted on rows.

    Attributes:
        matrix: M [m, n], float64.
        energy: M (G + l I) M^T [m, m], the metric in which directions are ranked.
        mean_in: mean of the inputs [n].
        mean_out: mean of the targets [m].
    """

    matrix: Tensor
    energy: Tensor
    mean_in: Tensor
    mean_out: Tensor


def fit_affine(
    inputs: Tensor, targets: Tensor, ridge: float, sink: Tensor | None = None, bias: bool = True
) -> AffineMap:
    """Ridge regression of `targets` on `inputs`, centred where a bias takes the means.

    Args:
        inputs: a [N, n], one row a completion position.
        targets: d [N, m].
        ridge: relative to the mean diagonal of the Gram.
        sink: activation of the attention sink at this site [n]; its direction is taken out of the inputs first, so
            that the map is exactly zero on it (M s = 0) and optimal among such maps.
        bias: with False the rows are not centred, both means are reported as zero, and M a is the whole fit.
    """
    a, d = inputs.double(), targets.double()
    mean_in, mean_out = a.mean(0), d.mean(0)
    if not bias:
        mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
    a = a - mean_in
    if sink is not None:
        s = sink.double() / sink.double().norm()
        a = a - torch.outer(a @ s, s)
    d = d - mean_out
    n_rows, n = a.shape
    penalty = ridge * a.square().sum() / n
    if n_rows < n:
        gram = a @ a.T
        matrix = torch.linalg.solve_ex(gram + penalty * torch.eye(n_rows, dtype=a.dtype, device=a.device), d)[0].T @ a
    else:
        gram = a.T @ a
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(n, dtype=a.dtype, device=a.device))
        matrix = torch.cholesky_solve(a.T @ d, factor).T
    # M (G + l I) = D^T A, hence M (G + l I) M^T = D^T (A M^T): no n x n product needed.
    energy = d.T @ (a @ matrix.T)
    return AffineMap(matrix, (energy + energy.T) / 2, mean_in, mean_out)


def top_directions(energy: Tensor, rank: int) -> Tensor:
    """Orthonormal columns U [m, rank]: the directions of largest energy, first the largest."""
    values, vectors = torch.linalg.eigh(energy)
    return vectors[:, values.argsort(descending=True)[:rank]]

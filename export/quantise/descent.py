"""Improve a rounded weight by coordinate descent on the loss that GPTQ minimises once from front to back.

With the Hessian H of a layer's rows, the loss of the rounded weight Ŵ is the trace of (W - Ŵ)^T H (W - Ŵ). GPTQ fixes a
block's scale before it knows the levels of later blocks, and a level before it knows how the later ones make up for it.
Here two steps alternate, and neither can raise the loss:

- With all levels fixed, the scales of an output's blocks are the regression of W on the levels, all blocks together.
- With all scales fixed, each level in turn becomes the best one for the others as they are (QuantEase, Behdin et al.,
  arXiv:2309.01885).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 4  # each gains less than the one before; the fourth gains less than one per cent


def descend(weight: Tensor, hessian: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return levels and scales with less loss; the zero points stay.

    Args:
        weight: the weight W, [K, N]. If its last block is padded, K includes the padding.
        hessian: H, [K, K], damped so that it is positive definite except for padding, whose rows and columns are 0.
        levels: the levels of each block, [G, K / G, N], from 0 to 15. Those of padding never change.
        scales: the scales, [G, N].
        zeros: the zero points, [G, N].

    Returns:
        The levels and the scales, in the same shapes.
    """
    levels, scales = levels.clone(), scales.clone()
    values = _values(levels, scales, zeros)
    pulls = hessian @ (weight - values)  # H (W - Ŵ): minus half of the loss's gradient
    losses = ((weight - values) * pulls).sum(0)
    for _ in range(_ROUNDS):
        again = _regressed(weight, hessian, levels - zeros[:, None], scales)
        values_again = _values(levels, again, zeros)
        pulls_again = hessian @ (weight - values_again)
        better = ((weight - values_again) * pulls_again).sum(0) < losses
        scales = torch.where(better, again, scales)
        values = torch.where(better, values_again, values)
        pulls = torch.where(better, pulls_again, pulls)
        _sweep(hessian, levels, scales, zeros, values, pulls)
        losses = ((weight - values) * pulls).sum(0)
    return levels, scales


def _values(levels: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return ((levels - zeros[:, None]) * scales[:, None]).flatten(0, 1)


def _regressed(weight: Tensor, hessian: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """Return the scales [G, N] for which each output loses least with the levels as they are.

    With the steps q_g (levels minus zero point) of an output's blocks, they solve sum_h (q_g^T H q_h) s_h = q_g^T H w.
    A block without any step keeps its scale.
    """
    count, size, outputs = steps.shape
    products = torch.empty(outputs, count, count, dtype=weight.dtype)
    for block in range(count):
        part = hessian[:, block * size : (block + 1) * size] @ steps[block]
        products[:, :, block] = (steps * part.view(count, size, outputs)).sum(1).T
    wanted = (steps * (hessian @ weight).view(count, size, outputs)).sum(1).T
    empty = (products.diagonal(dim1=1, dim2=2) <= 0).T
    # A small ridge towards nothing keeps the systems solvable; it is far below the rounding of the levels.
    ridge = products.diagonal(dim1=1, dim2=2).mean(1) * 1e-6 + 1e-30
    products += torch.eye(count, dtype=weight.dtype) * ridge[:, None, None]
    found = torch.linalg.solve(products, wanted).T
    return torch.where(empty | (found == 0) | ~found.isfinite(), scales, found)


def _sweep(hessian: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor, values: Tensor, pulls: Tensor) -> None:
    """Give each level in turn its best value; this changes `levels`, `values` and `pulls`."""
    count, size, _outputs = levels.shape
    for block in range(count):
        part = slice(block * size, (block + 1) * size)
        own, pull, before = hessian[part, part], pulls[part].clone(), values[part].clone()
        for i in range(size):
            if own[i, i] <= 0:  # padding
                continue
            wanted = values[part.start + i] + pull[i] / own[i, i]
            level = (wanted / scales[block] + zeros[block]).round().clamp(0, 15)
            change = (level - levels[block, i]) * scales[block]
            levels[block, i] = level
            values[part.start + i] += change
            pull -= own[:, i : i + 1] * change
        pulls -= hessian[:, part] @ (values[part] - before)

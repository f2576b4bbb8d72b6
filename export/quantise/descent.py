"""Improve a rounded weight by coordinate descent on the loss that GPTQ minimises once from front to back.

H is the Hessian of a layer's rows, damped as for GPTQ. The loss of the rounded weight Ŵ is the trace of
(W - Ŵ)^T H (W - Ŵ). GPTQ fixes a block's scale before it knows the levels of later blocks, and a level before it knows
how the later ones make up for it. Here two steps alternate, and neither can raise the loss of an output:

- With all levels fixed, the scales of an output's blocks are the regression of W on the levels, all blocks together.
- With all scales fixed, each level in turn becomes the best one for the others as they are (QuantEase, Behdin et al.,
  arXiv:2309.01885).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import LARGEST_LEVEL

_ROUNDS = 4  # each gains less than the one before; the fourth gains less than one per cent
_AT_ONCE = 1 << 24  # numbers in the systems that are solved together: 64 MiB


def descend(weight: Tensor, hessian: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return levels and scales of which no output has more loss than before; the zero points stay.

    Args:
        weight: the weight W, [K, N]. If its last block is padded, K includes the padding.
        hessian: H, [K, K], positive definite except for padding, whose rows and columns are 0.
        levels: the levels of each block, [G, K / G, N], from 0 to 15. Those of padding never change.
        scales: the scales, [G, N], none of them 0.
        zeros: the zero points, [G, N].

    Returns:
        The levels and the scales, in the same shapes; the arguments stay as they are.
    """
    levels = levels.clone()
    values = _values(levels, scales, zeros)
    pulls = hessian @ (weight - values)  # H (W - Ŵ): minus half of the loss's gradient
    for _ in range(_ROUNDS):
        scales, values, pulls = _regressed(weight, hessian, levels, scales, zeros, values, pulls)
        _sweep(hessian, levels, scales, zeros, values, pulls)
    return levels, _regressed(weight, hessian, levels, scales, zeros, values, pulls)[0]


def _values(levels: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return ((levels - zeros[:, None]) * scales[:, None]).flatten(0, 1)


def _regressed(
    weight: Tensor, hessian: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor, values: Tensor, pulls: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales, values and pulls for which each output loses least with the levels as they are."""
    fitted = scales + _changes(hessian, levels - zeros[:, None], pulls)
    fitted = torch.where(fitted == 0, scales, fitted)
    fitted_values = _values(levels, fitted, zeros)
    fitted_pulls = hessian @ (weight - fitted_values)
    # Rounding of float32 can make an output that was fitted before lose a little more.
    better = ((weight - fitted_values) * fitted_pulls).sum(0) < ((weight - values) * pulls).sum(0)
    pairs = (fitted, scales), (fitted_values, values), (fitted_pulls, pulls)
    scales, values, pulls = (torch.where(better, found, before) for found, before in pairs)
    return scales, values, pulls


def _changes(hessian: Tensor, steps: Tensor, pulls: Tensor) -> Tensor:
    """Return by how much the regression changes the scales, [G, N].

    With the steps q_g of an output's blocks (levels minus zero point), the changes c solve
    sum_h (q_g^T H q_h) c_h = q_g^T H (w - ŵ). The scale of a block without any step does not change.
    """
    count, size, _outputs = steps.shape
    outputs = max(1, _AT_ONCE // count**2)
    found = []
    for own, pull in zip(steps.split(outputs, 2), pulls.view(steps.shape).split(outputs, 2), strict=True):
        products = own.new_empty(own.shape[-1], count, count)
        for block in range(count):
            applied = hessian[:, block * size : (block + 1) * size] @ own[block]
            products[:, :, block] = (own * applied.view(own.shape)).sum(1).T
        diagonal = products.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(diagonal > 0, 1e-6 * diagonal, 1.0)  # for rounding, and for blocks without any step
        wanted = (own * pull).sum(1).T
        found.append(torch.linalg.solve(products, wanted).T)
    return torch.cat(found, 1)


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
            level = (wanted / scales[block] + zeros[block]).round().clamp(0, LARGEST_LEVEL)
            change = (level - levels[block, i]) * scales[block]
            levels[block, i] = level
            values[part.start + i] += change
            pull -= own[:, i : i + 1] * change
        pulls -= hessian[:, part] @ (values[part] - before)

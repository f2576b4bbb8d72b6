"""GPTQ: round a weight so that its products with calibration rows change least (Frantar et al., arXiv:2210.17323).

A weight W [K, N] is applied to rows x, whose Hessian is H = sum x x^T. The columns of x are taken block by block. The
error that rounding one value makes is passed on to the values that are not rounded yet, where H says that they can make
up for it. In a block with the weights w (before it is rounded) and ŵ (after), what remains is |U^-T (w - ŵ)|², with the
block's part U of the upper Cholesky factor of H^-1. The search for a block's scale minimises this loss, and not the
distance of ŵ from w. Coordinate descent (descent.py) then lowers the loss of the whole weight.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..inverse_factor import damped, inverse_factor
from .blocks import BLOCK, LARGEST_LEVEL, Blocks, FloatArray, pack
from .descent import descend

_MIDDLE = 8.0  # the zero point of a symmetric block
_AT_ONCE = 1 << 24  # values that are rounded together: a head has many outputs, and each is rounded for itself
_RANGES = (1.0, 0.9, 0.8)  # the shares of a block's range that its levels may span


def gptq(weight: FloatArray, hessian: Tensor, symmetric: bool, damping: float = 0.01) -> Blocks:
    """Quantise a weight to four bits.

    Args:
        weight: the weight, [K, N] float32.
        hessian: the sum of x x^T over the calibration rows x, [K, K].
        symmetric: whether all zero points are the middle level.
        damping: what is added to the Hessian's diagonal, relative to its mean: few calibration rows leave directions
            without any row.

    Returns:
        The blocks.
    """
    inputs = len(weight)
    definite = damped(hessian, damping)
    factor = inverse_factor(definite).float()
    padding = (0, -inputs % BLOCK)
    whole = functional.pad(definite.float(), padding * 2)
    found = []
    for part in torch.from_numpy(np.array(weight, np.float32)).split(max(1, _AT_ONCE // inputs), 1):
        levels, scales, zeros = _rounded_outputs(part, factor, symmetric)
        levels, scales = descend(functional.pad(part, (0, 0, *padding)), whole, levels, scales, zeros)
        found.append((levels.to(torch.uint8), scales, zeros.to(torch.uint8)))
    levels, scales, zeros = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    packed = pack(levels.permute(2, 0, 1).numpy(), 4)
    points = None if symmetric else pack(zeros.T.numpy(), 4)
    return Blocks(packed, np.ascontiguousarray(scales.T.numpy()), points, 4, inputs)


def _rounded_outputs(weight: Tensor, factor: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round some outputs [K, N]; return levels [G, BLOCK, N], scales [G, N] and zero points [G, N] of the G blocks."""
    inputs, outputs = weight.shape
    rest = weight.clone()
    count = -(-inputs // BLOCK)
    levels = torch.empty(count, BLOCK, outputs)
    scales, zeros = torch.empty(count, outputs), torch.empty(count, outputs)
    for number in range(count):
        part = slice(number * BLOCK, min((number + 1) * BLOCK, inputs))
        size = part.stop - part.start
        own = factor[part, part]
        found, scales[number], zeros[number] = _block(rest[part], own, symmetric)
        # A padded value is the zero point, which stands for 0.
        levels[number, :size], levels[number, size:] = found, zeros[number]
        missed = rest[part] - (found - zeros[number]) * scales[number]
        errors = torch.linalg.solve_triangular(own.T, missed, upper=False)
        rest[part.stop :] -= factor[part, part.stop :].T @ errors
    return levels, scales, zeros


def _block(weight: Tensor, factor: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the levels [k, N], the scales [N] and the zero points [N] of one block [k, N], each output for itself."""
    scales, zeros = _candidates(weight, symmetric)
    levels, losses = _rounded(weight, factor, scales, zeros)
    best = losses.argmin(0)
    index = torch.arange(weight.shape[1])
    levels, scales, zeros, losses = levels[:, best, index], scales[best, index], zeros[best, index], losses[best, index]
    # With the levels fixed, the best scale is a regression; with that scale, other levels may be better.
    steps = torch.linalg.solve_triangular(factor.T, levels - zeros, upper=False)
    wanted = torch.linalg.solve_triangular(factor.T, weight, upper=False)
    fitted = (steps * wanted).sum(0) / (steps * steps).sum(0).clamp(min=1e-30)
    fitted = torch.where(fitted == 0, scales, fitted)
    again, lower = _rounded(weight, factor, fitted[None], zeros[None])
    better = lower[0] < losses
    return torch.where(better, again[:, 0], levels), torch.where(better, fitted, scales), zeros


def _candidates(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points [C, N] that are tried for each output of a block [k, N]."""
    low, high = weight.amin(0), weight.amax(0)
    scales, zeros = [], []
    for share in _RANGES:
        if symmetric:  # levels reach from -8 to 7, so the sign of the scale decides which end reaches further
            widest = torch.where(high > -low, high, low) * (share / -_MIDDLE)
            scales += [widest, -widest]
            zeros += [torch.full_like(widest, _MIDDLE)] * 2
            continue
        step = (high.clamp(min=0) - low.clamp(max=0)) * (share / LARGEST_LEVEL)
        point = -low.clamp(max=0) * share / torch.where(step == 0, 1.0, step)
        scales += [step, step]
        zeros += [point.floor(), point.ceil().clamp(max=LARGEST_LEVEL)]
    found = torch.stack(scales)
    return torch.where(found == 0, 1.0, found), torch.stack(zeros)


def _rounded(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Round a block one input after another, each error passed on to the next ones.

    Args:
        weight: the block, [k, N].
        factor: its part of the Cholesky factor, [k, k].
        scales: the scales to try, [C, N].
        zeros: their zero points, [C, N].

    Returns:
        The levels, [k, C, N], and what remains of the errors, [C, N].
    """
    levels, errors = weight.new_empty(len(weight), *scales.shape), weight.new_empty(len(weight), *scales.shape)
    for i, row in enumerate(weight):
        passed = torch.einsum("e,ecn->cn", factor[:i, i], errors[:i])
        value = row - passed
        levels[i] = (value / scales + zeros).round().clamp(0, LARGEST_LEVEL)
        errors[i] = (value - (levels[i] - zeros) * scales) / factor[i, i]
    return levels, errors.square().sum(0)

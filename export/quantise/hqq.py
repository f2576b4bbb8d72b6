"""HQQ: half-quadratic quantisation, a search of zero points that needs no calibration (Badri and Shaji, 2023).

The blocks minimise |w - ŵ|^p with p below 1, which forgives the few values that are far off and moves the others
closer. Two steps alternate: a shrinkage picks the errors e that are forgiven, and the zero point becomes the mean that
w - e asks for. HQQ's own zero points are fractions, which MatMulNBits multiplies slowly and GatherBlockQuantized does
not read. So the best fraction is rounded at the end.
"""

from __future__ import annotations

import numpy as np

from .blocks import BLOCK, Blocks, FloatArray, pack

_LEVELS = 15.0
_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20  # the values of HQQ's authors


def hqq(weight: FloatArray) -> Blocks:
    """Quantise a weight [K, N] to four bits."""
    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    rows = np.zeros((outputs, blocks * BLOCK), np.float32)
    rows[:, :inputs] = weight.T
    values = rows.reshape(outputs, blocks, BLOCK)
    low, high = np.minimum(values.min(-1, keepdims=True), 0), np.maximum(values.max(-1, keepdims=True), 0)
    steps = np.where(high > low, (high - low) / _LEVELS, 1).astype(np.float32)
    zeros, beta = -low / steps, _BETA
    best, least = zeros, np.full_like(zeros, np.inf)
    for _ in range(_STEPS):
        levels = (values / steps + zeros).round().clip(0, _LEVELS)
        errors = values - (levels - zeros) * steps
        loss = (np.abs(errors) ** _NORM).mean(-1, keepdims=True)
        best, least = np.where(loss < least, zeros, best), np.minimum(loss, least)
        size = np.abs(errors)
        forgiven = np.sign(errors) * np.maximum(size - np.maximum(size, 1e-8) ** (_NORM - 1) / beta, 0)
        zeros = (levels - (values - forgiven) / steps).mean(-1, keepdims=True)
        beta *= _GROWTH
    points = best.round().clip(0, _LEVELS)
    levels = (values / steps + points).round().clip(0, _LEVELS)
    return Blocks(pack(levels.astype(np.uint8), 4), steps[..., 0], pack(points[..., 0].astype(np.uint8), 4), 4, inputs)

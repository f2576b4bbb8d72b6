"""HQQ: half-quadratic quantisation, a search that needs no calibration (Badri and Shaji, 2023).

The blocks minimise |w - ŵ|^p with p below 1, which forgives the few values that are far off and moves the others
closer. Two steps alternate: a shrinkage picks the errors e that are forgiven, and the levels are fitted to w - e. HQQ
fits the zero points only, as fractions. MatMulNBits multiplies by fractions slowly, and GatherBlockQuantized does not
read them. With whole zero points nothing of that search is left, so the scales are fitted as well, by regression.
"""

from __future__ import annotations

import numpy as np

from .blocks import BLOCK, LARGEST_LEVEL, Blocks, FloatArray, pack

_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20  # the values of HQQ's authors


def hqq(weight: FloatArray) -> Blocks:
    """Quantise a weight [K, N] to four bits."""
    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    rows = np.zeros((outputs, blocks * BLOCK), np.float32)
    rows[:, :inputs] = weight.T
    values = rows.reshape(outputs, blocks, BLOCK)
    low, high = np.minimum(values.min(-1, keepdims=True), 0), np.maximum(values.max(-1, keepdims=True), 0)
    scales = np.where(high > low, (high - low) / LARGEST_LEVEL, 1).astype(np.float32)
    zeros, beta = -low / scales, _BETA
    best_scales, best_points, least = scales, zeros, np.full_like(zeros, np.inf)
    for _ in range(_STEPS):
        points = zeros.round().clip(0, LARGEST_LEVEL)
        levels = (values / scales + points).round().clip(0, LARGEST_LEVEL)
        errors = values - (levels - points) * scales
        size = np.abs(errors)
        loss = (size**_NORM).mean(-1, keepdims=True)
        better = loss < least
        best_scales, best_points = np.where(better, scales, best_scales), np.where(better, points, best_points)
        least = np.minimum(loss, least)
        forgiven = np.sign(errors) * np.maximum(size - np.maximum(size, 1e-8) ** (_NORM - 1) / beta, 0)
        wanted = values - forgiven
        zeros = (levels - wanted / scales).mean(-1, keepdims=True)
        steps = levels - zeros.round().clip(0, LARGEST_LEVEL)
        squares = (steps * steps).sum(-1, keepdims=True)
        fitted = (steps * wanted).sum(-1, keepdims=True) / np.where(squares == 0, 1, squares)
        scales = np.where(fitted > 0, fitted, scales)
        beta *= _GROWTH
    levels = (values / best_scales + best_points).round().clip(0, LARGEST_LEVEL)
    packed, points = pack(levels.astype(np.uint8), 4), pack(best_points[..., 0].astype(np.uint8), 4)
    return Blocks(packed, best_scales[..., 0], points, 4, inputs)

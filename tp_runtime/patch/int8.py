"""int8 for the large tensors of a patch file: symmetric quantisation of low-rank factors and KV entries.

With x a tensor, m = max|x| along one axis, and half(y) the number y rounded to the 11 significant bits of half
precision:

    scale = half(m / 127)        q = round(x / scale), from -127 to 127        x' = q * scale

One scale serves what is used together: a direction of a factor, a channel of the keys, a head of one entry's values.

    part     shape                   axis of m       scales
    a        [in, rank]              in              [rank]
    b        [rank, out]             out             [rank]
    key      [n, heads, head dim]    n               [heads, head dim]
    value    [n, heads, head dim]    head dim        [n, heads]

q * scale has at most 18 significant bits, so a float32 holds it exactly. The largest |q| along the axis is 127, so
quantising x' gives the same q and the same scale: a patch that was read from an int8 file can be written again without
a loss. Where x is zero along the whole axis, the scale is `LEAST_HALF`, so that every q is 0 and no scale is.

This module knows nothing of files. It works on numpy arrays, so that the exporter can measure the values of the file
before there is one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Int8 = NDArray[np.int8]

AXES = {"a": 0, "b": 1, "key": 0, "value": 2}
"""For each part that may be int8 the axis that shares a scale."""
LEAST_HALF = float(np.finfo(np.float16).smallest_normal)  # 2^-14; below it half precision has fewer significant bits
LARGEST = 127

_LARGEST_HALF = float(np.finfo(np.float16).max)
_LEAST_SINGLE = float(np.finfo(np.float32).smallest_normal)
_LARGEST_SINGLE = 2.0**121 * (1 + 2.0**-7)  # times 127 it is still a float32; the next number of 11 bits is not


def quantise(part: str, values: Float) -> tuple[Int8, Float]:
    """Quantise a tensor: q = round(x / scale), with one scale for each line along the part's axis.

    Args:
        part: a key of `AXES`.
        values: x, finite, in the part's shape.

    Returns:
        q in the shape of x, and the scales in the shape of x without the part's axis.
    """
    axis, wide = AXES[part], values.astype(np.float64)
    scales = _half(np.abs(wide).max(axis) / LARGEST)
    with np.errstate(under="ignore"):
        q = np.rint(wide / np.expand_dims(scales, axis))
    return np.clip(q, -LARGEST, LARGEST).astype(np.int8), scales.astype(np.float32)


def dequantise(part: str, q: Int8, scales: Float, out: Float | None = None) -> Float:
    """Return x' = q * scale as float32. A product beyond float32 is infinite.

    Args:
        part: a key of `AXES`.
        q: the int8 values, in the part's shape.
        scales: the scales, in the shape of q without the part's axis.
        out: the array to write to, in the part's shape; None makes one.
    """
    values: Float = np.empty(q.shape, np.float32) if out is None else out
    values[...] = q
    with np.errstate(over="ignore", under="ignore"):
        values *= np.expand_dims(scales, AXES[part])
    return values


def round_to_int8(part: str, values: Float) -> Float:
    """Return the float32 values that a tensor has after it was stored as int8; doing it twice changes nothing more.

    Args:
        part: "a" [in, rank], "b" [rank, out], "key" or "value" [n, heads, head dim].
        values: the tensor.
    """
    return dequantise(part, *quantise(part, values))


def scale_shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of this shape."""
    axis = AXES[part]
    return (*shape[:axis], *shape[axis + 1 :])


def scales_fit_half(scales: Float) -> bool:
    """Return whether half precision holds every scale that `quantise` returned; otherwise they are stored as float32.

    Tensors with values below 127 * 2^-14 = 0.0078 along a whole axis, or above 8.3 million, have such scales.
    """
    return bool(((scales >= LEAST_HALF) & (scales <= _LARGEST_HALF)).all())


def _half(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to 11 significant bits, within the normal float32 numbers; zeros become `LEAST_HALF`."""
    fraction, exponent = np.frexp(scales)
    rounded = np.clip(np.ldexp(np.rint(fraction * 2**11), exponent - 11), _LEAST_SINGLE, _LARGEST_SINGLE)
    return np.where(np.rint(LARGEST * scales / rounded) == 0, LEAST_HALF, rounded)  # every q would be 0

"""Four bits for the entries of a patch file: blocks of 64 numbers with a step and a zero point each.

Keys are divided into blocks along the entries, channel by channel, and values along the channels, entry by entry. With
x a block,

    x' = (q + zero) * scale        q from 0 to 15,  zero a whole number from -128 to 127

    part     shape                   axis of the blocks    scales and zero points
    key      [n, heads, head dim]    n                     [blocks, heads, head dim]
    value    [n, heads, head dim]    head dim              [n, heads, blocks]

The last block of an axis may be shorter. A zero point need not be among the levels: the channels of keys often lie far
from 0 and spread little. The scale is the smallest that reaches both ends of a block's range, or of a part of the range
if a smaller step loses less than the cut ends do:

    scale = down(max((high - low) / 15, high / 142, -low / 128))        zero = round(low / scale)

down(y) rounds to the 11 significant bits of half precision, towards zero, and to at least 2^-14; round(y) rounds halves
up. So the ends of the range always get the levels 0 and 15, or the last zero point, and quantising x' gives the same
levels, scales and zero points: a patch that was read from a file of four bits is written again without a loss.
q + zero has nine bits, so a float32 holds x' exactly.

Two levels share a byte: the one of the even channel has the lower half.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Double = NDArray[np.float64]

BLOCK_AXES = {"key": 0, "value": 2}
"""For each part that may have four bits the axis that is divided into blocks."""
BLOCK = 64
LARGEST_VALUE = 2.0**18  # up to here half precision holds the scale of every block

_LEVELS = 15  # the largest level
_LEAST_ZERO, _LARGEST_ZERO = -128, 127
_SHARES = (1.0, 0.93, 0.86, 0.79, 0.72)  # of a block's range that the levels may span
_LEAST_SCALE = float(np.finfo(np.float16).smallest_normal)  # 2^-14; below it half precision has fewer bits


class FourBits(NamedTuple):
    """A tensor of four bits.

    Attributes:
        packed: two levels in each byte, [n, heads, head dim / 2].
        scales: the scales, which half precision holds.
        zeros: the zero points, in the shape of the scales.
    """

    packed: NDArray[np.uint8]
    scales: Float
    zeros: NDArray[np.int8]


def quantise4(part: str, values: Float) -> FourBits:
    """Quantise entries to four bits.

    Args:
        part: a key of `BLOCK_AXES`.
        values: x, of at most `LARGEST_VALUE`, [n, heads, head dim] with an even head dim.
    """
    axis = BLOCK_AXES[part]
    levels, scales, zeros = _quantised_lines(np.moveaxis(values, axis, -1))
    levels = np.moveaxis(levels, -1, axis)
    packed: NDArray[np.uint8] = levels[..., 0::2] | (levels[..., 1::2] << np.uint8(4))
    return FourBits(packed, np.moveaxis(scales, -1, axis), np.moveaxis(zeros, -1, axis))


def dequantise4(part: str, bits: FourBits, out: Float | None = None) -> Float:
    """Return x' = (q + zero) * scale as float32. A product beyond float32 is infinite.

    Args:
        part: a key of `BLOCK_AXES`.
        bits: the tensor of four bits.
        out: the array to write to, [n, heads, head dim]; None makes one.
    """
    packed, axis = bits.packed, BLOCK_AXES[part]
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    values: Float = np.empty(shape, np.float32) if out is None else out
    values[..., 0::2] = packed & 15
    values[..., 1::2] = packed >> 4
    count = shape[axis]
    with np.errstate(over="ignore", under="ignore"):
        values += np.repeat(bits.zeros, BLOCK, axis).take(range(count), axis)
        values *= np.repeat(bits.scales, BLOCK, axis).take(range(count), axis)
    return values


def round_to_int4(part: str, values: Float) -> Float:
    """Return the float32 values that entries have after they were stored in four bits; doing it twice changes nothing.

    Args:
        part: "key" or "value".
        values: the entries, [n, heads, head dim] with an even head dim.
    """
    return dequantise4(part, quantise4(part, values))


def round_lines_to_int4(lines: Float) -> Float:
    """Return the values that numbers have after they were stored in four bits along their last axis.

    Args:
        lines: [..., k], for example a channel of the keys of all entries, or all channels of the values of one entry.
    """
    levels, scales, zeros = _quantised_lines(lines)
    repeats = np.arange(lines.shape[-1]) // BLOCK
    rounded: Float = (levels + zeros[..., repeats].astype(np.float32)) * scales[..., repeats]
    return rounded


def block_shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales and of the zero points of entries of this shape."""
    axis = BLOCK_AXES[part]
    return (*shape[:axis], -(-shape[axis] // BLOCK), *shape[axis + 1 :])


def _quantised_lines(lines: Float) -> tuple[NDArray[np.uint8], Float, NDArray[np.int8]]:
    """Return the levels [..., k] of lines [..., k], and the scales and zero points of their blocks [..., blocks]."""
    wide = lines.astype(np.float64)
    found = [_quantised(wide[..., start : start + BLOCK]) for start in range(0, lines.shape[-1], BLOCK)]
    levels, scales, zeros = zip(*found, strict=True)
    return (
        np.concatenate(levels, -1),
        np.stack(scales, -1).astype(np.float32),
        np.stack(zeros, -1).astype(np.int8),
    )


def _quantised(block: Double) -> tuple[NDArray[np.uint8], Double, Double]:
    """Return the levels [..., k], the scales [...] and the zero points [...] of blocks [..., k]."""
    low, high = block.min(-1), block.max(-1)
    best = _levels(block, low, high)
    least = _loss(block, *best)
    middle, half = (low + high) / 2, (high - low) / 2
    for share in _SHARES[1:]:
        found = _levels(block, middle - half * share, middle + half * share)
        loss = _loss(block, *found)
        better = loss < least
        levels = np.where(better[..., None], found[0], best[0])
        best = levels, np.where(better, found[1], best[1]), np.where(better, found[2], best[2])
        least = np.minimum(loss, least)
    levels, scale, zero = best
    return levels.astype(np.uint8), scale, zero


def _levels(block: Double, low: Double, high: Double) -> tuple[Double, Double, Double]:
    """Return the levels, the scales and the zero points of blocks [..., k] between two ends [...]."""
    widest = np.maximum((high - low) / _LEVELS, np.maximum(high / (_LEVELS + _LARGEST_ZERO), low / _LEAST_ZERO))
    scale = _down(widest)
    zero = np.clip(_rounded(low / scale), _LEAST_ZERO, _LARGEST_ZERO)
    return np.clip(_rounded(block / scale[..., None]) - zero[..., None], 0, _LEVELS), scale, zero


def _rounded(numbers: Double) -> Double:
    """Round to whole numbers, halves up, so that adding a whole number adds it to the result."""
    return np.floor(numbers + 0.5)


def _loss(block: Double, levels: Double, scale: Double, zero: Double) -> Double:
    """Return the squared distance of each block from what its levels stand for."""
    return np.square((levels + zero[..., None]) * scale[..., None] - block).sum(-1)


def _down(scales: Double) -> Double:
    """Round to 11 significant bits, towards zero, and to at least the smallest scale."""
    fraction, exponent = np.frexp(scales)
    return np.maximum(np.ldexp(np.floor(fraction * 2**11), exponent - 11), _LEAST_SCALE)

"""Quantise weights in blocks of few bits with ONNX Runtime's own quantisers, and dequantise them for a torch student.

A weight [K, N] is divided into blocks of values along K: of 32 values, and in eight bits of up to 128. Each block has a
scale, and a zero point if the method is asymmetric. `MatMulNBits` stores and multiplies weights in that form.
`Blocks.dequantised` returns exactly the weights that `MatMulNBits` stores, so a patch can be fitted against the student
that will run (option --student-precision).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tp_runtime.session import require_onnxruntime

BLOCK = 32
LARGEST_LEVEL = 15  # of four bits
WIDE = 128
"""The widest block of eight bits. A scale for 128 values loses little there (docs/precision.md), and products are
scaled less often: the kernels take 0.7 to 0.8 of the time (benchmarks/batch_kernels.py)."""
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """A quantised weight [K, N], as MatMulNBits stores it.

    Attributes:
        packed: the quantised values, [N, blocks, bytes per block] uint8; of two values in a byte, the low half is the
            first.
        scales: the scale of each block, [N, blocks] float32.
        zero_points: the zero point of each block, [N, bytes] uint8, packed like the values; None if every zero point is
            the middle, 2^(bits - 1).
        bits: the bits of a value, 4 or 8.
        inputs: the number of inputs, K.
    """

    packed: NDArray[np.uint8]
    scales: FloatArray
    zero_points: NDArray[np.uint8] | None
    bits: int
    inputs: int

    @property
    def block(self) -> int:
        """The number of values in a block."""
        return self.packed.shape[-1] * 8 // self.bits

    def with_half_scales(self) -> Blocks:
        """Return the same blocks with scales that float16 holds exactly; `scales` stays a float32 array."""
        return replace(self, scales=self.scales.astype(np.float16).astype(np.float32))

    def dequantised(self) -> FloatArray:
        """Return the weight [K, N] that the graph computes with, float32."""
        outputs, blocks = self.scales.shape
        values = _unpacked(self.packed, self.bits).astype(np.float32)  # [N, blocks, block]
        if self.zero_points is None:
            zeros: Any = np.float32(2 ** (self.bits - 1))
        else:
            zeros = _unpacked(self.zero_points, self.bits)[:, :blocks, None].astype(np.float32)
        weight = (values - zeros) * self.scales[:, :, None]
        return np.ascontiguousarray(weight.reshape(outputs, -1)[:, : self.inputs].T)


def round_to_nearest(weight: FloatArray, bits: int, symmetric: bool, widest: int = BLOCK) -> Blocks:
    """Round each value to the nearest of its block's 2^bits levels, between the block's smallest and largest value.

    Args:
        weight: the weight, [K, N].
        bits: 4 or 8.
        symmetric: whether every zero point is the middle.
        widest: the widest block; a block has this width or half of it and so on, so that blocks end where K does. If
            even 32 does not divide K, blocks of 32 are padded.
    """
    require_onnxruntime()
    from onnxruntime.capi import _pybind_state as state

    inputs, outputs = weight.shape
    block = widest
    while block > BLOCK and inputs % block:
        block //= 2
    blocks = -(-inputs // block)
    padded = np.zeros((blocks * block, outputs), np.float32)
    padded[:inputs] = weight
    packed = np.zeros((outputs, blocks, block * bits // 8), np.uint8)
    scales = np.zeros((outputs, blocks), np.float32)
    zeros = np.zeros((outputs, -(-blocks * bits // 8)), np.uint8)
    quantise = {4: state.quantize_matmul_4bits, 8: state.quantize_matmul_8bits}[bits]
    quantise(packed, padded, scales, zeros, block, outputs, inputs, symmetric)
    return Blocks(packed, scales, None if symmetric else zeros, bits, inputs)


def k_quant(weight: FloatArray, bits: int) -> Blocks:
    """Search the scale and zero point of each block that minimise the weighted square error, as llama.cpp does."""
    require_onnxruntime()
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    rows = np.zeros((outputs, blocks * BLOCK), np.float32)
    rows[:, :inputs] = weight.T
    with np.errstate(divide="ignore", invalid="ignore"):  # a block of equal values keeps its initial scale
        values, scales, zeros = quant_tensor_k_quant_cpu(rows, bits, BLOCK)
    values = values.reshape(outputs, blocks, BLOCK).astype(np.uint8)
    zeros = zeros.reshape(outputs, blocks).astype(np.uint8)
    return Blocks(
        pack(values, bits), scales.reshape(outputs, blocks).astype(np.float32), pack(zeros, bits), bits, inputs
    )


def pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack values of few bits into bytes along the last dimension; the low half of a byte is the first value."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return (values[..., ::2] | (values[..., 1::2] << 4)).astype(np.uint8)


def _unpacked(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return values
    return np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)

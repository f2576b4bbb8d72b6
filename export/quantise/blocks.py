"""Weights in blocks of few bits, by ONNX Runtime's own quantisers, and the same weights as a torch student sees them.

A weight [K, N] is cut into blocks of 32 along K; each block has a scale, and a zero point if the method is asymmetric.
`MatMulNBits` holds and multiplies that form. What it holds is exactly what `Blocks.dequantised` gives back, so a patch
can be fitted against the student that will run (patching.py, --student-precision).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tp_runtime.session import require_onnxruntime

BLOCK = 32
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """A quantised weight [K, N], as MatMulNBits holds it.

    Attributes:
        packed: [N, blocks, bytes a block] uint8, the first of two values in the low half of a byte.
        scales: [N, blocks] float32.
        zero_points: [N, bytes] uint8, packed likewise; None: the middle, 2^(bits - 1).
        bits: 4 or 8.
        inputs: K.
    """

    packed: NDArray[np.uint8]
    scales: FloatArray
    zero_points: NDArray[np.uint8] | None
    bits: int
    inputs: int

    def dequantised(self) -> FloatArray:
        """The weight [K, N] that is computed with, float32."""
        outputs, blocks = self.scales.shape
        values = _unpacked(self.packed, self.bits).astype(np.float32)  # [N, blocks, BLOCK]
        if self.zero_points is None:
            zeros: Any = np.float32(2 ** (self.bits - 1))
        else:
            zeros = _unpacked(self.zero_points, self.bits)[:, :blocks, None].astype(np.float32)
        weight = (values - zeros) * self.scales[:, :, None]
        return np.ascontiguousarray(weight.reshape(outputs, -1)[:, : self.inputs].T)


def round_to_nearest(weight: FloatArray, bits: int, symmetric: bool) -> Blocks:
    """Each value to the nearest of its block's 2^bits levels, between the block's least and largest value."""
    require_onnxruntime()
    from onnxruntime.capi import _pybind_state as state

    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((blocks * BLOCK, outputs), np.float32)
    padded[:inputs] = weight
    packed = np.zeros((outputs, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.zeros((outputs, blocks), np.float32)
    zeros = np.zeros((outputs, -(-blocks * bits // 8)), np.uint8)
    quantise = {4: state.quantize_matmul_4bits, 8: state.quantize_matmul_8bits}[bits]
    quantise(packed, padded, scales, zeros, BLOCK, outputs, inputs, symmetric)
    return Blocks(packed, scales, None if symmetric else zeros, bits, inputs)


def k_quant(weight: FloatArray, bits: int) -> Blocks:
    """Scale and zero point of each block searched for the least weighted square error, as llama.cpp does."""
    require_onnxruntime()
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    rows = np.zeros((outputs, blocks * BLOCK), np.float32)
    rows[:, :inputs] = weight.T
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of one value; they keep what they started from
        values, scales, zeros = quant_tensor_k_quant_cpu(rows, bits, BLOCK)
    values = values.reshape(outputs, blocks, BLOCK).astype(np.uint8)
    zeros = zeros.reshape(outputs, blocks).astype(np.uint8)
    return Blocks(
        _packed(values, bits), scales.reshape(outputs, blocks).astype(np.float32), _packed(zeros, bits), bits, inputs
    )


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return (values[..., ::2] | (values[..., 1::2] << 4)).astype(np.uint8)


def _unpacked(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return values
    return np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)

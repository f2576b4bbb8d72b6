"""Blocks of quantised weights: ONNX Runtime computes with their dequantised values."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tp_export.quantise import BLOCK, MEASURED, Blocks, quantised
from tp_export.quantise.precision import INT4, PRECISIONS, check_precision
from tp_runtime.errors import ModelFormatError
from tp_runtime.session import description

QUANTISED = ("int8", *INT4)


def blocks_of(name: str, weight: np.ndarray) -> Blocks:
    """Quantise a weight; a calibrated precision gets rows without correlations."""
    precision = quantised(name)
    if precision.calibrated is not None:
        return precision.calibrated(weight, torch.eye(len(weight)))
    return precision.linear(weight)


def matrix(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in QUANTISED if quantised(name).calibrated is None])
@settings(deadline=None, max_examples=15)
@given(inputs=st.integers(1, 100), outputs=st.integers(1, 20), seed=st.integers(0, 99))
def test_no_weight_moves_further_than_its_block_allows(name: str, inputs: int, outputs: int, seed: int) -> None:
    weight = matrix(inputs, outputs, seed)
    blocks = blocks_of(name, weight)
    found = blocks.dequantised()
    assert found.shape == weight.shape
    # The bound is one step: half a step for rounding, and another half if the zero point is a whole number. k-quant
    # and HQQ also narrow the range if that is better for the whole block, and clip values outside it: by 1.2 and 1.9
    # steps at most in 1,500 matrices.
    steps = np.repeat(np.abs(blocks.scales), blocks.block, axis=1)[:, :inputs].T
    bound = {"int4-k-quant": 1.5, "int4-hqq": 2.2}.get(name, 1.01)
    assert (np.abs(found - weight) <= bound * steps + 1e-6).all()


@pytest.mark.parametrize("inputs", [96, 192, 256])
@pytest.mark.parametrize("name", QUANTISED)
def test_onnxruntime_multiplies_by_what_is_dequantised(name: str, inputs: int) -> None:
    weight, x = matrix(inputs, 40), matrix(3, inputs, 1)
    blocks = blocks_of(name, weight)
    exact = _product(blocks, x, accuracy_level=1)  # float32 activations
    assert np.abs(exact - x @ blocks.dequantised()).max() < 1e-4
    rounded = _product(blocks, x, accuracy_level=4)
    assert np.abs(rounded - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(("inputs", "width"), [(640, 128), (128, 128), (576, 64), (96, 32), (100, 32), (8, 32)])
def test_blocks_of_eight_bits_are_as_wide_as_the_inputs_allow(inputs: int, width: int) -> None:
    blocks = quantised("int8").linear(matrix(inputs, 6))
    assert blocks.block == width and blocks.scales.shape == (6, -(-inputs // width))
    for name in ("int4-gptq", "int4-symmetric"):
        head, linear = (quantised(name).quantise(matrix(inputs, 6), is_head=is_head) for is_head in (True, False))
        assert (head.bits, head.block, linear.bits, linear.block) == (8, width, 4, BLOCK)
    assert quantised("int4-symmetric-fp16").quantise(matrix(inputs, 6), is_head=True).block == BLOCK


def test_wide_blocks_of_eight_bits_lose_next_to_nothing() -> None:
    weight = matrix(1024, 50)
    found = quantised("int8").linear(weight).dequantised()
    assert np.square(found - weight).mean() < 1e-4 * np.square(weight).mean()


def _product(blocks: Blocks, x: np.ndarray, accuracy_level: int) -> np.ndarray:
    tensors = {"w": blocks.packed, "s": blocks.scales, "z": blocks.zero_points}
    given = {name: array for name, array in tensors.items() if array is not None}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *given],
        ["y"],
        domain="com.microsoft",
        K=blocks.inputs,
        N=len(blocks.scales),
        bits=blocks.bits,
        block_size=blocks.block,
        accuracy_level=accuracy_level,
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    weights = [numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("name", INT4)
def test_a_precision_in_float16_has_the_weights_of_its_own_name_and_scales_that_float16_holds(name: str) -> None:
    weight = matrix(96, 40)
    wanted, found = (
        quantised(name).quantise(weight, is_head=False),
        quantised(f"{name}-fp16").quantise(weight, is_head=False),
    )
    assert np.array_equal(found.packed, wanted.packed)
    assert np.array_equal(found.scales, found.scales.astype(np.float16))
    assert np.abs(found.scales / wanted.scales - 1).max() < 2**-10


def test_weights_with_sixteen_levels_are_exact_in_four_bits() -> None:
    weight = np.random.default_rng(0).integers(-8, 8, (64, 8)).astype(np.float32)
    weight[0::BLOCK], weight[1::BLOCK] = -8, 7  # every block spans the whole range
    assert np.array_equal(quantised("int4-rtn").linear(weight).dequantised(), weight)


def test_a_folder_accepts_exactly_the_precisions_of_the_exporter() -> None:
    assert set(PRECISIONS) - set(MEASURED) == set(description.PRECISIONS)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="int4-k-quant"):
        check_precision("int3")

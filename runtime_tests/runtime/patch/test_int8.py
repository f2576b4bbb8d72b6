"""int8 rounding: the error is at most half a step, the scales are usable, and rounding twice changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tp_runtime.patch import round_to_int8
from tp_runtime.patch.int8 import AXES, LEAST_HALF, dequantise, quantise, scale_shape, scales_fit_half

many = settings(max_examples=300, deadline=None)
LARGEST = float(np.finfo(np.float32).max)


@st.composite
def tensors(draw):
    """A part and a tensor of its shape, with values of any magnitude that a float32 has."""
    part = draw(st.sampled_from(sorted(AXES)))
    shape = draw(arrays.array_shapes(min_dims=2 if part in "ab" else 3, max_dims=2 if part in "ab" else 3, max_side=5))
    scale = draw(st.sampled_from([1e-44, 1e-38, 1e-30, 1e-6, 1e-3, 1.0, 1e5, 1e30, LARGEST]))
    unit = draw(arrays.arrays(np.float64, shape, elements=st.floats(-1, 1)))
    return part, (unit * scale).astype(np.float32)


@many
@given(tensors())
def test_the_scales_are_finite_positive_and_one_for_each_line_along_the_axis(found):
    part, values = found
    q, scales = quantise(part, values)
    assert scales.shape == scale_shape(part, values.shape) and q.shape == values.shape
    assert q.dtype == np.int8 and scales.dtype == np.float32 and q.min() >= -127
    assert np.isfinite(scales).all() and (scales > 0).all()
    if scales_fit_half(scales):
        np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)


@many
@given(tensors())
def test_the_error_is_at_most_half_a_step(found):
    """A step is the scale; the largest value may miss its step by what rounding the scale to 11 bits moves it."""
    part, values = found
    q, scales = quantise(part, values)
    step = np.expand_dims(scales.astype(np.float64), AXES[part])
    error = np.abs(dequantise(part, q, scales).astype(np.float64) - values)
    assert (error <= (0.5 + 127 * 2.0**-11) * step).all()


@many
@given(tensors())
def test_rounding_twice_gives_the_same_int8_values_and_scales(found):
    part, values = found
    q, scales = quantise(part, values)
    again, same = quantise(part, dequantise(part, q, scales))
    np.testing.assert_array_equal(again, q)
    np.testing.assert_array_equal(same, scales)
    rounded = round_to_int8(part, values)
    np.testing.assert_array_equal(round_to_int8(part, rounded), rounded)
    assert np.isfinite(rounded).all()


@pytest.mark.parametrize("part", sorted(AXES))
def test_zeros_stay_zeros_with_a_scale_that_half_precision_holds(part):
    zeros = np.zeros((2, 3) if part in "ab" else (2, 3, 4), np.float32)
    q, scales = quantise(part, zeros)
    assert not q.any() and (scales == LEAST_HALF).all() and scales_fit_half(scales)


def test_values_are_rounded_to_the_nearest_step_of_their_own_channel():
    keys = np.zeros((2, 1, 2), np.float32)
    keys[:, 0, 0] = [127.0, 63.4]  # a channel with steps of 1
    keys[:, 0, 1] = [-0.25, 0.125]  # a channel with steps of 0.25 / 127
    q, scales = quantise("key", keys)
    assert q[:, 0, 0].tolist() == [127, 63] and q[:, 0, 1].tolist() == [-127, 64]
    assert scales.shape == (1, 2) and scales[0, 0] == 1 and scales[0, 1] == np.float16(0.25 / 127)


def test_each_part_has_its_own_axis():
    assert scale_shape("a", (12, 4)) == (4,) and scale_shape("b", (4, 8)) == (4,)
    assert scale_shape("key", (5, 2, 16)) == (2, 16) and scale_shape("value", (5, 2, 16)) == (5, 2)


@pytest.mark.parametrize(("largest", "fits"), [(1.0, True), (127 * 2.0**-14, True), (0.007, False), (8e6, True)])
def test_half_precision_holds_the_scales_of_ordinary_values(largest, fits):
    assert scales_fit_half(quantise("a", np.full((3, 1), largest, np.float32))[1]) is fits

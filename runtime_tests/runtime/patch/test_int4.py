"""Rounding to four bits: the error is at most half a step, and rounding twice changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tp_runtime.patch import round_lines_to_int4, round_to_int4, round_to_int8
from tp_runtime.patch.int4 import BLOCK, BLOCK_AXES, LARGEST_VALUE, block_shape, dequantise4, quantise4

many = settings(max_examples=200, deadline=None)


@st.composite
def tensors(draw: Any) -> tuple[str, Any]:
    """A part and entries of any magnitude that four bits hold, spread around a number that may be far from 0."""
    part = draw(st.sampled_from(sorted(BLOCK_AXES)))
    count, heads, pairs = draw(st.sampled_from([1, 2, 63, 64, 65])), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    scale = draw(st.sampled_from([1e-44, 1e-30, 1e-6, 1e-3, 0.1, 1.0, 1e4, LARGEST_VALUE]))
    middle = draw(st.sampled_from([0.0, 0.5, -0.9, 0.999]))
    unit = draw(arrays.arrays(np.float64, (count, heads, 2 * pairs), elements=st.floats(-1, 1)))
    values = ((middle + (1 - abs(middle)) * unit) * scale).astype(np.float32)
    # Numbers of few bits often lie halfway between two levels.
    return part, values.astype(np.float16).astype(np.float32) if draw(st.booleans()) and scale < 6e4 else values


@many
@given(tensors())
def test_there_is_a_usable_scale_and_a_zero_point_for_each_block(found: tuple[str, Any]) -> None:
    part, values = found
    packed, scales, zeros = quantise4(part, values)
    assert packed.shape == (*values.shape[:2], values.shape[2] // 2) and packed.dtype == np.uint8
    assert scales.shape == zeros.shape == block_shape(part, values.shape)
    assert scales.dtype == np.float32 and zeros.dtype == np.int8
    assert (scales > 0).all()
    np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)


@many
@given(tensors())
def test_rounding_twice_gives_the_same_levels_scales_and_zero_points(found: tuple[str, Any]) -> None:
    part, values = found
    bits = quantise4(part, values)
    rounded = dequantise4(part, bits)
    assert np.isfinite(rounded).all()
    for first, second in zip(bits, quantise4(part, rounded), strict=True):
        np.testing.assert_array_equal(first, second)


@many
@given(tensors())
def test_the_loss_is_at_most_that_of_levels_from_end_to_end(found: tuple[str, Any]) -> None:
    """With one block and all of its range, no value is further from its level than half a step and a bit."""
    part, values = found
    axis = BLOCK_AXES[part]
    lines = np.moveaxis(values.astype(np.float64), axis, -1)[..., :BLOCK]
    low, high = lines.min(-1), lines.max(-1)
    step = np.maximum((high - low) / 15, np.maximum(high / 142, -low / 128))
    rounded = np.moveaxis(round_to_int4(part, values).astype(np.float64), axis, -1)[..., :BLOCK]
    error = np.square(rounded - lines).sum(-1)
    most = lines.shape[-1] * np.square((0.5 + 142 * 2.0**-10) * np.maximum(step, 2.0**-14))
    assert (error <= most).all()


def test_a_number_halfway_between_two_levels_is_rounded_the_same_way_wherever_the_range_begins() -> None:
    """Rounding halves to even would give the upper end of this block the level 14, and another scale the next time."""
    values = np.array([1.5, 16.5], np.float32).reshape(2, 1, 1).repeat(2, 2)
    rounded = round_to_int4("key", values)
    assert rounded[:, 0, 0].tolist() == [2.0, 17.0]
    np.testing.assert_array_equal(round_to_int4("key", rounded), rounded)


@pytest.mark.parametrize("part", sorted(BLOCK_AXES))
def test_blocks_do_not_change_each_other(part: str) -> None:
    axis = BLOCK_AXES[part]
    values = np.random.default_rng(0).standard_normal((100, 2, 100)).astype(np.float32)
    first = np.take(values, range(BLOCK), axis)
    together = np.take(round_to_int4(part, values), range(BLOCK), axis)
    np.testing.assert_array_equal(together, round_to_int4(part, first))


def test_values_far_from_zero_that_spread_little_keep_their_differences() -> None:
    """The channels of keys are like that; int8 without a zero point would give them a step of 5/127."""
    values = (5 + 0.4 * np.random.default_rng(1).random((64, 1, 2))).astype(np.float32)
    assert np.abs(round_to_int4("key", values) - values).max() < 0.5 * 5.4 / 142 + 1e-3
    assert np.abs(round_to_int8("key", values) - values).max() > 0.015


def test_an_outlier_is_cut_where_that_loses_less() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, (64, 1, 2)).astype(np.float32)
    values[0] = 1.4
    low, step = values.min(0), (values.max(0) - values.min(0)) / 15
    from_end_to_end = low + np.rint((values - low) / step) * step
    rounded = round_to_int4("key", values)
    assert rounded.max(0).min() < 1.39
    assert np.square(rounded - values).mean() < 0.97 * np.square(from_end_to_end - values).mean()


def test_lines_round_as_the_channels_of_keys_and_as_the_values_of_entries() -> None:
    values = np.random.default_rng(3).standard_normal((70, 3, 4)).astype(np.float32)
    keys = round_lines_to_int4(np.moveaxis(values, 0, -1))
    np.testing.assert_array_equal(np.moveaxis(keys, -1, 0), round_to_int4("key", values))
    np.testing.assert_array_equal(round_lines_to_int4(values), round_to_int4("value", values))


@pytest.mark.parametrize("part", sorted(BLOCK_AXES))
def test_zeros_stay_zeros(part: str) -> None:
    zeros = np.zeros((2, 1, 4), np.float32)
    bits = quantise4(part, zeros)
    assert not bits.zeros.any() and (bits.scales.astype(np.float16) > 0).all()
    np.testing.assert_array_equal(dequantise4(part, bits), zeros)

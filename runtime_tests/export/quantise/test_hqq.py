"""HQQ: smaller errors than rounding to nearest by its own measure, with blocks that the graph's operators read."""

from __future__ import annotations

import numpy as np
import pytest

from tp_export.quantise import Blocks
from tp_export.quantise.blocks import round_to_nearest
from tp_export.quantise.hqq import hqq


def loss(blocks: Blocks, weight: np.ndarray) -> float:
    return float((np.abs(blocks.dequantised() - weight) ** 0.7).mean())


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("inputs", [20, 70, 256])
def test_the_errors_are_smaller_than_by_rounding_to_nearest(inputs: int, outliers: bool) -> None:
    numbers = np.random.default_rng(inputs)
    weight = 0.05 * (numbers.standard_t(3, (inputs, 64)) if outliers else numbers.standard_normal((inputs, 64)))
    weight = weight.astype(np.float32)
    found = hqq(weight)
    assert found.scales.dtype == np.float32 and found.scales.shape == (64, -(-inputs // 32))
    assert loss(found, weight) < 0.99 * loss(round_to_nearest(weight, 4, symmetric=False), weight)


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_blocks_of_one_value_are_exact(value: float) -> None:
    weight = np.full((40, 3), value, np.float32)
    assert np.abs(hqq(weight).dequantised() - weight).max() < 1e-6

"""The mask of a constraint: what it does to logits of every width and type."""

from __future__ import annotations

import numpy as np
import pytest

from tp_runtime.generation.constraint import masked


def packed(allowed: np.ndarray) -> np.ndarray:
    """Return the bits of a boolean array, as a constraint gives them."""
    bits = np.packbits(allowed, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view("<u4")


@pytest.mark.parametrize("width", [1, 7, 8, 31, 32, 33, 259, 49152])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_not_allowed_becomes_minus_infinity_and_the_rest_stays(width: int, dtype: type) -> None:
    random = np.random.default_rng(width)
    logits = random.standard_normal(width).astype(dtype)
    before = logits.copy()
    allowed = random.random(width) < 0.5
    result = masked(logits, packed(allowed))
    assert result.shape == (width,)
    assert np.array_equal(result, np.where(allowed, logits, -np.inf))
    assert np.array_equal(logits, before)


def test_infinite_logits_are_masked_and_nan_is_left_to_the_sampler() -> None:
    logits = np.array([np.inf, np.inf, -np.inf, np.nan, np.nan, 1], dtype=np.float32)
    result = masked(logits, packed(np.array([True, False, True, True, False, True])))
    assert np.array_equal(result, np.array([np.inf, -np.inf, -np.inf, np.nan, np.nan, 1]), equal_nan=True)


def test_a_row_of_a_batch_and_bits_in_any_layout_are_accepted() -> None:
    logits = np.arange(6 * 40, dtype=np.float32).reshape(6, 40)[::2]
    allowed = np.arange(40) % 3 == 0
    bits = np.stack([packed(allowed), packed(~allowed)], axis=1)[:, 0]
    for row in logits:
        assert np.array_equal(masked(row, bits), np.where(allowed, row, -np.inf))

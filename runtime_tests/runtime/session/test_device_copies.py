"""Copies that ONNX Runtime makes within one device: crops, appended zeros, parts of buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tp_runtime.session import DeviceCopies
from tp_runtime.session.device import select_device


@pytest.fixture(scope="module", params=[np.float32, np.float16])
def copies(request: pytest.FixtureRequest) -> DeviceCopies:
    return DeviceCopies(onnxruntime, select_device("cpu"), np.dtype(request.param))


def values(*shape: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(1, 100, shape).astype(np.float64)  # float16 holds them exactly


def test_one_row_is_copied_into_a_row_of_a_longer_buffer_and_the_rest_becomes_zero(copies: DeviceCopies) -> None:
    source, target = copies.to_device(values(1, 3, 10, 4)), copies.to_device(values(5, 3, 16, 4, seed=1))
    copies.copy(copies.rows(source), copies.rows(target, 2, 1))
    found = target.numpy()
    assert np.array_equal(found[2, :, :10], source.numpy()[0]) and not found[2, :, 10:].any()
    others = [0, 1, 3, 4]
    assert np.array_equal(found[others], values(5, 3, 16, 4, seed=1)[others])


@pytest.mark.parametrize("skipped", [0, 3])
@pytest.mark.parametrize("room", [1, 5, 7, 12])
def test_positions_are_left_out_at_either_end(copies: DeviceCopies, room: int, skipped: int) -> None:
    source, target = copies.to_device(values(2, 3, 10, 4)), copies.new((2, 3, room, 4))
    copies.copy(copies.rows(source), copies.rows(target), skipped)
    wanted = np.zeros((2, 3, room, 4))
    kept = source.numpy()[:, :, skipped : skipped + room]
    wanted[:, :, : kept.shape[2]] = kept
    assert np.array_equal(target.numpy(), wanted)


def test_rows_are_cleared(copies: DeviceCopies) -> None:
    target = copies.to_device(values(4, 2, 6, 8))
    copies.clear(copies.rows(target, 1, 2))
    found = target.numpy()
    assert not found[1:3].any() and np.array_equal(found[[0, 3]], values(4, 2, 6, 8)[[0, 3]])


def test_a_row_moves_within_a_buffer(copies: DeviceCopies) -> None:
    buffer = copies.to_device(values(4, 2, 6, 8))
    copies.copy(copies.rows(buffer, 3, 1), copies.rows(buffer, 0, 1))
    assert np.array_equal(buffer.numpy(), values(4, 2, 6, 8)[[3, 1, 2, 3]])

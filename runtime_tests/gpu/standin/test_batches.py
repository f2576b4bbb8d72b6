"""Batches on ONNX Runtime's real CUDA provider, without a GPU: rows join and leave on the device (batches.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.gpu.standin.batches import LENGTHS
from runtime_tests.gpu.standin.environment import StandIn

MODES = ("ordinary", "captured")


@pytest.fixture(scope="module")
def found(standin: StandIn, float16_folder: Path) -> Any:
    """The measurements on one tiny random model that computes in float16."""
    return json.loads(standin.run("-m", "runtime_tests.gpu.standin.batches", str(float16_folder)))


@pytest.mark.parametrize("mode", MODES)
def test_no_keys_or_values_cross_the_bus_when_rows_join_and_leave(found: Any, mode: str) -> None:
    """What crosses it is the ids, positions and masks of the prompts' chunks and of the steps, and logits."""
    assert (found[mode]["failure"], found[mode]["device"]) == (None, "cuda")
    for change in (*found[mode]["first"], *found[mode]["alike"]):
        if change["what"] == "join":
            runs = max(LENGTHS) // 32 + 2  # of the prompt's chunks, with a step of the other rows after each
            assert change["bytes_in"] < found["bytes_per_position"] * max(LENGTHS) // 2
        else:
            runs = 1
            assert change["bytes_in"] < 24 * len(LENGTHS) * (max(LENGTHS) + 8)
        assert change["bytes_out"] <= 4 * found["vocab"] * runs * (len(LENGTHS) + 1)
        least = found["bytes_per_position"] * min(LENGTHS)
        assert change["bytes_on_device"] > least or change["what"] == "step"


@pytest.mark.parametrize("mode", MODES)
def test_rows_under_other_patches_move_these_patches_and_nothing_else(found: Any, mode: str) -> None:
    """When the rows change, the patches of all rows are sent again, padded to the largest rank."""
    for alike, unlike in zip(found[mode]["alike"], found[mode]["unlike"], strict=True):
        assert unlike["bytes_out"] == alike["bytes_out"]
        rows = alike["rows"] + {"join": 1, "leave": -1, "step": 0}[alike["what"]]
        sends = alike["what"] != "step" and rows > 1  # one row alone is bound, and has no stack of patches
        assert unlike["bytes_in"] - alike["bytes_in"] == (rows * found["patch_bytes"] if sends else 0)

"""Batches on ONNX Runtime's real CUDA provider, without a GPU: rows join and leave on the device (batches.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime_tests.export.sources import tiny_gemma, tiny_llama
from runtime_tests.gpu.standin.batches import LENGTHS
from runtime_tests.gpu.standin.environment import StandIn
from runtime_tests.gpu.standin.test_standin import standin
from tp_export.graph import export_model
from tp_export.source import open_source
from tp_runtime.session.device import CPU

__all__ = ["standin", "tiny_gemma", "tiny_llama"]  # pytest finds these fixtures by their names here

MODES = ("ordinary", "captured")


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gemma"])
def found(request: pytest.FixtureRequest, standin: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The measurements on one tiny random model with weights in four bits that computes in float16."""
    source, out = open_source(request.getfixturevalue(request.param)), tmp_path_factory.mktemp("batches") / "model"
    export_model(source, out, precision="int4-symmetric-fp16")
    return json.loads(standin.run("-m", "runtime_tests.gpu.standin.batches", str(out)))


def test_weights_in_four_bits_run_on_the_gpu_in_float16_and_are_captured(found: Any) -> None:
    assert sorted(found["placement"][CPU]) == ["Cast", "Squeeze"]
    assert {found[mode]["failure"] for mode in MODES} == {None} and {found[mode]["device"] for mode in MODES} == {
        "cuda"
    }


@pytest.mark.parametrize("mode", MODES)
def test_no_keys_or_values_cross_the_bus_when_rows_join_and_leave(found: Any, mode: str) -> None:
    """What crosses it is the ids, positions and masks of the prompts' chunks and of the steps, and logits."""
    for change in found[mode]["alike"]:
        if change["what"] == "join":
            runs = max(LENGTHS) // 32 + 2  # of the prompt's chunks, with a step of the other rows after each
            assert change["bytes_in"] < 24 * runs * (32 + len(LENGTHS) * max(LENGTHS))
        else:
            runs = 1
            assert change["bytes_in"] < 24 * len(LENGTHS) * (max(LENGTHS) + 8)
        assert change["bytes_out"] <= 4 * found["vocab"] * runs * (len(LENGTHS) + 1)
        least = found["bytes_per_position"] * min(LENGTHS)
        assert change["bytes_on_device"] > least or change["what"] == "step"


@pytest.mark.parametrize("mode", MODES)
def test_rows_under_other_patches_move_these_patches_and_nothing_else(found: Any, mode: str) -> None:
    for alike, unlike in zip(found[mode]["alike"], found[mode]["unlike"], strict=True):
        assert unlike["bytes_out"] == alike["bytes_out"]
        if alike["what"] == "step":
            assert unlike["bytes_in"] == alike["bytes_in"]

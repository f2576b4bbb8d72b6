"""The CUDA path on ONNX Runtime's real CUDA provider, without a GPU: placement, captures, traffic, allocations.

Under the provider lies a stand-in for NVIDIA's libraries (standin.c), in an environment of its own (environment.py).
The measurements are made there (inside.py); what they must be is stated here. Kernels compute nothing on the stand-in:
their results are what runtime_tests/gpu/test_gpu.py compares on a real GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.gpu.standin.environment import StandIn
from tp_runtime.session.device import CPU, CUDA

STEADY = 3  # the number of the first step that finds everything in place
SMALL = 4096  # bytes


@pytest.fixture(scope="module")
def found(standin: StandIn, float16_folder: Path) -> Any:
    """The measurements on one tiny random model in float16."""
    return json.loads(standin.run("-m", "runtime_tests.gpu.standin.inside", str(float16_folder)))


def steady(found: Any, **wanted: Any) -> list[dict[str, Any]]:
    """Return the counts of decode steps after the first ones, for those of the given properties."""
    steps = [step for step in found["steps"] if step["number"] >= STEADY]
    chosen = [step for step in steps if all(step[name] == value for name, value in wanted.items())]
    assert chosen
    return chosen


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in a buffer of several tensors."""
    return -(-size // 256) * 256


def test_every_node_is_on_the_gpu_but_those_of_the_length_that_the_host_reads(found: Any) -> None:
    """The attention operator wants the longest length there, with windowed layers two of them.

    A Memcpy node would wait for the GPU.
    """
    assert sorted(found["placement"][CPU]) == ["Add"] * found["windowed"] + ["Cast", "Squeeze"]
    everywhere = [*found["placement"][CUDA], *found["placement"][CPU]]
    assert not [operator for operator in everywhere if operator.startswith("Memcpy")]


def test_every_bucket_of_ranks_is_captured_on_two_threads_and_nothing_is_allocated_meanwhile(found: Any) -> None:
    capture = found["capture"]
    assert (capture["failure"], capture["captures"], capture["captured_allocations"]) == (None, 2 * 4, 0)


def test_a_captured_step_is_one_replay_and_a_larger_rank_takes_ordinary_steps(found: Any) -> None:
    for step in steady(found):
        assert step["replays"] == (step["captured"] and step["rank"] in (None, 4, 16, 64))


def test_a_steady_step_allocates_nothing(found: Any) -> None:
    assert {step["allocations"] for step in steady(found)} == {0}


def test_a_step_launches_what_its_operators_need_and_no_more(found: Any) -> None:
    """The layers of the design with windows have more norms; a slot is two products and a sum."""
    layer, others = (15, 13) if found["windowed"] else (10, 10)
    for step in steady(found, captured=False, rank=16):
        assert step["launches"] <= found["layers"] * layer + 3 * found["slots"] + others


def test_a_steady_step_sends_its_numbers_and_fetches_the_largest_logits(found: Any) -> None:
    """An id, a position, a length and what windowed layers differ by go in; each kind begins at a multiple of 256."""
    for step in steady(found):
        rows = 3 if step["request"] == "batch" else 1
        assert (step["bytes_in"], step["copies_in"]) == (256 * (4 if found["windowed"] else 3), 1)
        best = min(128, found["vocab"])
        out = 2 * found["vocab"] if step["request"] == "all logits" else aligned(rows * 2 * best) + rows * 8 * best
        assert step["bytes_out"] == out and out <= SMALL


def test_a_switch_of_captured_steps_moves_the_patch_once(found: Any) -> None:
    for switch in found["switches"]:
        assert switch["first"]["copies_in"] == 1
        assert 0 <= switch["first"]["bytes_in"] - switch["bytes"] < 256 * switch["tensors"]
        assert switch["first"]["bytes_out"] == switch["first"]["allocations"] == 0
        assert not any(switch["again"].values())

"""Slots that state a scale, for graphs in float16 that compute their residual stream scaled down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.folders import alter, describe, fill
from tp_runtime.errors import ModelFormatError
from tp_runtime.generation.row_slots import StackedSlots
from tp_runtime.patch import Delta
from tp_runtime.session import BoundPatch, ModelFolder, Slot, slot_arrays, write_slots_file

SLOT = Slot(0, "mlp_out", 12, 8, 2.0**-5)


def test_a_folder_keeps_the_scale_of_a_slot_and_other_slots_do_not_mention_it(tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    slots = ModelFolder.open(path).slots
    write_slots_file(describe(path, slots={**slots, (1, "mlp_out"): replace(slots[1, "mlp_out"], scale=2.0**-5)}))
    written = json.loads((path / "patch_slots.json").read_text())["slots"]
    assert [slot.get("scale") for slot in written] == [None, 0.03125]
    assert [slot.scale for slot in ModelFolder.open(path).slots.values()] == [1.0, 0.03125]


@pytest.mark.parametrize("value", [None, 0, 1, 0.0, 1.0, 2.0, -0.5, 0.3, True, "0.5", [0.5]])
def test_a_scale_of_another_form_is_refused(value: Any, tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    alter(path, lambda data: data["slots"][0].update(scale=value))
    with pytest.raises(ModelFormatError, match=r"slots\[0\]\.scale.*a power of two below 1"):
        ModelFolder.open(path)


def test_rows_under_different_patches_get_the_values_that_each_patch_gets_alone() -> None:
    class Binding:
        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            bound[name] = value.array

    class Value:
        def __init__(self, array: Any) -> None:
            self.array, self.shape = array, lambda: array.shape

    rng, bound = np.random.default_rng(0), {}
    deltas = [Delta(rng.standard_normal((12, 2)), rng.standard_normal((2, 8)), rng.standard_normal(8)) for _ in "ab"]
    patches = [
        BoundPatch(dict, (name, ()), deltas={(0, "mlp_out"): delta}) for name, delta in zip("ab", deltas, strict=True)
    ]
    StackedSlots({(0, "mlp_out"): SLOT}, 2, np.dtype(np.float16), Value).bind(Binding(), patches)
    for row, delta in enumerate(deltas):
        for name, wanted in slot_arrays(delta, SLOT, np.float16).items():
            assert (bound[name][row] == wanted[0]).all()
            assert name.endswith(".a") or not (wanted == slot_arrays(delta, replace(SLOT, scale=1.0), "f2")[name]).any()

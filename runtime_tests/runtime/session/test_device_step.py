"""The masks of decode steps on a device, which all threads of a session share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tp_runtime.session import DeviceSteps, ModelFolder


class _Slow(list[Any]):
    """The masks of a session in which another thread, which needs a shorter one, appends right after this one."""

    def append(self, value: Any) -> None:
        super().append(value)
        super().append(onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], "int64", "cpu", 0))


def test_a_mask_is_long_enough_whatever_other_threads_append(
    tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder.open(tiny_llama_export)
    steps = DeviceSteps(onnxruntime, folder, "cpu", "float32", ("", None), print)
    monkeypatch.setattr(steps, "_ones", _Slow())
    count = 3 * folder.context_window
    assert steps._ones_of(count).shape()[0] >= count
    assert steps._ones_of(count).shape()[0] >= count

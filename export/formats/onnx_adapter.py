"""A patch as an `.onnx_adapter` for onnxruntime-genai: values for overridable initializers, which slots are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tp_runtime.errors import PatchFormatError
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder, check_base, fit_slots, require_onnxruntime, slot_arrays
from tp_runtime.storage import atomic_file


def write_onnx_adapter(patch: Patch, folder: ModelFolder, out: Path) -> None:
    """Write a patch as an `.onnx_adapter` for the slots of one exported folder, whole or not at all.

    Args:
        patch: the patch.
        folder: the export.
        out: ends in .onnx_adapter; a file there is replaced.

    Raises:
        PatchFormatError: another suffix.
        BaseMismatchError, PatchTargetError, PatchShapeError, PatchValueError: the patch does not fit the folder.
        DeviceUnavailableError: no ONNX Runtime.
        OSError: the operating system's error; no file is left behind.
    """
    if out.suffix != ".onnx_adapter":
        raise PatchFormatError("the name of an adapter", field="OUT", got=out.name, wanted="*.onnx_adapter")
    patch.require_weights_only("onnxruntime-genai adapter")
    check_base(patch, folder.base_model, folder.base_digest, folder.precision)
    deltas = fit_slots(patch, folder.slots)
    ort = require_onnxruntime()
    dtype = np.float16 if folder.kv.dtype == "f16" else np.float32
    values = {}
    for key, slot in folder.slots.items():
        # A slot that is left alone keeps its default, which is the base unless the folder has a patch as its default.
        if key in deltas or folder.default_patch is not None:
            for name, array in slot_arrays(deltas.get(key), slot, dtype).items():
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    with atomic_file(out) as temporary:
        adapter.export_adapter(str(temporary))

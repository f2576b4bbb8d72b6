"""A patch as an `.onnx_adapter` for onnxruntime-genai.

Such a file holds values for overridable initializers, and the slots of an exported graph are overridable initializers.
"""

from __future__ import annotations

from pathlib import Path

from tp_runtime.errors import PatchFormatError
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder, check_base, fit_slots, require_onnxruntime, slot_arrays
from tp_runtime.storage import Kind, atomic_file, check_writable

_MAGIC = slice(4, 8), b"TORT"  # where a flat buffer names its kind, and ONNX Runtime's name for adapters


def write_onnx_adapter(patch: Patch, folder: ModelFolder, out: Path) -> None:
    """Write a patch as an `.onnx_adapter` for the slots of one exported folder, completely or not at all.

    Args:
        patch: the patch.
        folder: the exported model folder.
        out: the path of the file, which ends in .onnx_adapter. An existing file is replaced if it is an adapter.

    Raises:
        PatchFormatError: `out` does not end in .onnx_adapter.
        OutputError: `out` holds something that is not replaced.
        BaseMismatchError, PatchTargetError, PatchShapeError, PatchValueError: the patch does not fit the folder.
        DeviceUnavailableError: ONNX Runtime is not installed.
        OSError: the operating system reports an error. No file is left behind.
    """
    if out.suffix != ".onnx_adapter":
        raise PatchFormatError(
            "the output file's name does not end in .onnx_adapter", field="OUT", got=out.name, wanted="*.onnx_adapter"
        )
    patch.require_weights_only("onnxruntime-genai adapter")
    check_base(
        patch, folder.base_model, folder.base_digest, folder.precision, folder.digest_change, folder.weights_digest
    )
    deltas = fit_slots(patch, folder.slots)
    ort = require_onnxruntime()
    values = {}
    for key, slot in folder.slots.items():
        # A slot that gets no values keeps its default, which is the base unless the folder has a default patch.
        if key in deltas or folder.default_patch is not None:
            for name, array in slot_arrays(deltas.get(key), slot, folder.kv.numpy_dtype).items():
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    with atomic_file(out, ONNX_ADAPTER) as temporary:
        try:
            adapter.export_adapter(str(temporary))
        except RuntimeError:
            check_writable(temporary)  # ONNX Runtime does not say why it could not write
            raise


def _no_adapter(file: Path) -> str | None:
    place, magic = _MAGIC
    with file.open("rb") as handle:
        return None if handle.read(place.stop)[place] == magic else "another file"


ONNX_ADAPTER = Kind("an adapter for onnxruntime-genai", _no_adapter)

"""One exported graph on one device: the model folder, the ONNX Runtime session, its slots and KV caches, bound patches.

This room knows nothing of text, of sampling, or of where a completion ends.
"""

from .best_logits import BestLogits
from .bound_patch import BoundPatch, not_a_patch
from .bound_values import BoundValuesStore
from .default_patch import read_default_patch
from .description import GRAPH_FILE, KV, DefaultPatch, DigestChange, Slot, past_name, present_name
from .device import DEVICES, cuda_is_expected, require_onnxruntime
from .device_copies import DeviceCopies
from .device_step import DeviceStep, DeviceSteps, Logits
from .graph import Graph
from .graph_file import LARGEST_GRAPH
from .interface import (
    BEST_IDS,
    BEST_VALUES,
    FIRST_LOGIT,
    LENGTH_SHIFT,
    WINDOWED_SHIFT,
    WINDOWED_TOTAL,
    check_interface,
)
from .kv_buffers import InPlaceBuffers, grown_capacity, shift_values
from .kv_cache import CacheKey, KVCache
from .layer_kinds import Lengths, Windowed
from .model_folder import DEFAULT_FILE, PREPARED, ModelFolder, describe_files, write_slots_file
from .prepared import check_prepared, has_prepared, prepare
from .probe import ProbeCheck, check_probe, measure_probe
from .replaceable import MODEL_FOLDER
from .settings import BOUND_PATCH_BYTES, SessionOptions, SessionSettings
from .slots import as_added, check_base, check_rows, fit_slots, slot_arrays
from .threads import share_threads
from .uses import Use, Uses
from .windows import kv_bytes

__all__ = [
    "BEST_IDS",
    "BEST_VALUES",
    "BOUND_PATCH_BYTES",
    "DEFAULT_FILE",
    "DEVICES",
    "FIRST_LOGIT",
    "GRAPH_FILE",
    "KV",
    "LARGEST_GRAPH",
    "LENGTH_SHIFT",
    "MODEL_FOLDER",
    "PREPARED",
    "WINDOWED_SHIFT",
    "WINDOWED_TOTAL",
    "BestLogits",
    "BoundPatch",
    "BoundValuesStore",
    "CacheKey",
    "DefaultPatch",
    "DeviceCopies",
    "DeviceStep",
    "DeviceSteps",
    "DigestChange",
    "Graph",
    "InPlaceBuffers",
    "KVCache",
    "Lengths",
    "Logits",
    "ModelFolder",
    "ProbeCheck",
    "SessionOptions",
    "SessionSettings",
    "Slot",
    "Use",
    "Uses",
    "Windowed",
    "as_added",
    "check_base",
    "check_interface",
    "check_prepared",
    "check_probe",
    "check_rows",
    "cuda_is_expected",
    "describe_files",
    "fit_slots",
    "grown_capacity",
    "has_prepared",
    "kv_bytes",
    "measure_probe",
    "not_a_patch",
    "past_name",
    "prepare",
    "present_name",
    "read_default_patch",
    "require_onnxruntime",
    "share_threads",
    "shift_values",
    "slot_arrays",
    "write_slots_file",
]

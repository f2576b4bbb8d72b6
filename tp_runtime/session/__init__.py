"""One exported graph on one device: the model folder, the ONNX Runtime session, its slots and KV caches, bound patches.

This room knows nothing of text, of sampling, or of where a completion ends.
"""

from .bound_patch import BoundPatch
from .description import KV, DefaultPatch, DigestChange, Slot, past_name, present_name
from .device import DEVICES, require_onnxruntime
from .graph import FIRST_LOGIT, Graph
from .kv_buffers import grown_capacity
from .kv_cache import CacheKey, KVCache
from .model_folder import DEFAULT_FILE, PREPARED, ModelFolder, describe_files, write_slots_file
from .prepared import prepare
from .probe import ProbeCheck, check_probe, measure_probe
from .settings import SessionOptions, SessionSettings
from .slots import check_base, check_rows, fit_slots, slot_arrays
from .threads import share_threads

__all__ = [
    "DEFAULT_FILE",
    "DEVICES",
    "FIRST_LOGIT",
    "KV",
    "PREPARED",
    "BoundPatch",
    "CacheKey",
    "DefaultPatch",
    "DigestChange",
    "Graph",
    "KVCache",
    "ModelFolder",
    "ProbeCheck",
    "SessionOptions",
    "SessionSettings",
    "Slot",
    "check_base",
    "check_probe",
    "check_rows",
    "describe_files",
    "fit_slots",
    "grown_capacity",
    "measure_probe",
    "past_name",
    "prepare",
    "present_name",
    "require_onnxruntime",
    "share_threads",
    "slot_arrays",
    "write_slots_file",
]

"""The patch as a value and as a file: low-rank deltas, a KV prefix, their algebra, and the `.safetensors` format.

This room knows nothing of graphs, sessions, devices or text.
"""

from .config import PatchConfig
from .delta import Delta
from .file import DTYPES, MAX_FILE_BYTES, read_tensors
from .kind import PATCH_FILE
from .kv_prefix import KVPrefix
from .names import KV_PARTS, SITES, SlotKey, slot_name
from .patch import FLOAT_PRECISIONS, Patch

__all__ = [
    "DTYPES",
    "FLOAT_PRECISIONS",
    "KV_PARTS",
    "MAX_FILE_BYTES",
    "PATCH_FILE",
    "SITES",
    "Delta",
    "KVPrefix",
    "Patch",
    "PatchConfig",
    "SlotKey",
    "read_tensors",
    "slot_name",
]

"""The patch as a value and as a file: low-rank deltas, a KV prefix, their algebra, and the `.safetensors` format.

This room knows nothing of graphs, sessions, devices or text.
"""

from .arrays import in_bytes
from .capabilities import (
    ADDS_TO_WEIGHTS,
    AT_A_COST,
    BEFORE_SYSTEM,
    ENTRIES_STAND,
    FLOAT_PRECISIONS,
    Capabilities,
    fitted_precision,
)
from .config import MAX_REPORT, PatchConfig, context_digest
from .container import MAX_FILE_BYTES, read_tensors
from .delta import Delta
from .dtypes import DTYPES
from .encoding import check_dtype, entry_nbytes, entry_tensors
from .int4 import round_lines_to_int4, round_to_int4
from .int8 import round_to_int8
from .kind import PATCH_FILE
from .kv_prefix import KVPrefix
from .names import KV_PARTS, SITES, SlotKey, slot_name
from .patch import Patch
from .tensors import Tensor

__all__ = [
    "ADDS_TO_WEIGHTS",
    "AT_A_COST",
    "BEFORE_SYSTEM",
    "DTYPES",
    "ENTRIES_STAND",
    "FLOAT_PRECISIONS",
    "KV_PARTS",
    "MAX_FILE_BYTES",
    "MAX_REPORT",
    "PATCH_FILE",
    "SITES",
    "Capabilities",
    "Delta",
    "KVPrefix",
    "Patch",
    "PatchConfig",
    "SlotKey",
    "Tensor",
    "check_dtype",
    "context_digest",
    "entry_nbytes",
    "entry_tensors",
    "fitted_precision",
    "in_bytes",
    "read_tensors",
    "round_lines_to_int4",
    "round_to_int4",
    "round_to_int8",
    "slot_name",
]

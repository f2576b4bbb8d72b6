"""A patch that is ready to run: its tensors on the device, and the key of the caches that are made under it.

The terms in the key state the values: each identity is computed from the values that it names, never taken from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..patch import Delta, KVPrefix, SlotKey
from .kv_cache import CacheKey


@dataclass(frozen=True)
class BoundPatch:
    """A patch on the device: the tensors to bind, and the cache key it runs under.

    Attributes:
        values: the OrtValues to bind, by graph input name; an input without one keeps the session's default.
        key: the key of every cache that is made under this patch.
        prefix: the entries at the front of every cache that is made under this patch.
        deltas: the patch's deltas, by (layer, site); a batch whose rows run under different patches needs them.
    """

    values: dict[str, Any]
    key: CacheKey
    prefix: KVPrefix | None = None
    deltas: Mapping[SlotKey, Delta] = field(default_factory=dict)

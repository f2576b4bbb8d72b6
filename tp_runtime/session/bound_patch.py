"""A patch that is ready to run: its tensors on the device, and the key of the caches made under it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..patch import Delta, KVPrefix, SlotKey
from .kv_cache import CacheKey


@dataclass(frozen=True)
class BoundPatch:
    """A patch on the device: what to bind, and the cache key it runs under.

    Attributes:
        values: graph input name -> OrtValue; what is not in it keeps the session's default.
        key: of every cache made under it.
        prefix: entries put at the front of every cache made under it.
        deltas: what the slots add, by (layer, site), for a batch whose rows differ; None where only the graph knows.
    """

    values: dict[str, Any]
    key: CacheKey
    prefix: KVPrefix | None = None
    deltas: Mapping[SlotKey, Delta] | None = None

"""A patch that is ready to run: the tensors to bind, and the key of the caches that are made under it.

The terms in the key state the values: each identity is computed from the values that it names, never taken from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PatchTargetError
from ..patch import Delta, KVPrefix, SlotKey
from .kv_cache import CacheKey
from .layer_kinds import NO_ENTRIES, Lengths


@dataclass(frozen=True, eq=False)
class BoundPatch:
    """A patch that a graph can run, and the cache key it runs under.

    Attributes:
        get_values: returns the OrtValues to bind, by graph input name; an input without one keeps the session's
            default. They may have to be converted first (bound_values.py).
        key: the key of every cache that is made under this patch.
        prefix: the entries at the front of every cache that is made under this patch.
        deltas: the patch's deltas, by (layer, site); a batch whose rows run under different patches needs them.
        entries: the number of entries of `prefix` in the layers of each kind.
    """

    get_values: Callable[[], Mapping[str, Any]]
    key: CacheKey
    prefix: KVPrefix | None = None
    deltas: Mapping[SlotKey, Delta] = field(default_factory=dict)
    entries: Lengths = NO_ENTRIES

    @property
    def values(self) -> Mapping[str, Any]:
        """The OrtValues to bind. Refer to this object for as long as they are bound: a binding does not."""
        return self.get_values()


def require_bound(bound: object) -> None:
    """Raise PatchTargetError unless the value is a bound patch."""
    if not isinstance(bound, BoundPatch):
        raise PatchTargetError(
            "the value is not a bound patch", field="bound", got=type(bound).__name__, wanted="the result of bind"
        )


def not_a_patch(got: object, wanted: str) -> PatchTargetError:
    """Return the error for a value that should have been a patch."""
    return PatchTargetError(
        "the value is not a patch",
        field="patch",
        got=type(got).__name__,
        wanted=wanted,
    )

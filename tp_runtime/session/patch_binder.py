"""Put patches on the device of one session, ready to run: the defaults, the repair and the patches of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from ..patch import FLOAT_PRECISIONS, Delta, Patch, SlotKey, in_bytes
from .bound_patch import BoundPatch, not_a_patch
from .bound_values import BoundValues, BoundValuesStore
from .default_patch import read_default_patch
from .kv_cache import CacheKey
from .layer_kinds import entry_counts
from .model_folder import ModelFolder
from .precision_note import PrecisionNotes
from .slots import check_patch, folder_arrays


class PatchBinder:
    """The patches of one session. It is made before the session, whose defaults it sets, and placed once it is open.

    Args:
        ort: the onnxruntime module.
        folder: the model folder.
        defaults: a patch whose tensors become the session's defaults; None takes the folder's default patch, if it has
            one.
        kept_bytes: the largest number of bytes of converted patches to keep.
        options: ONNX Runtime's options of a session that opens on the CPU, which get the default values; None for
            another device.

    Attributes:
        repair: the patch that compensates what quantisation costs, which is part of the base; None if the folder has
            none.
        default_patch: the patch of `default`, without the repair; None if `default` is the base.
        default: the patch that the session runs under if nothing is bound.
        base: the base model as a bound patch.
        values: the converted tensors of the patches that ran last.

    Raises:
        PatchError: `defaults` or the folder's default patch does not fit the graph, or the latter's file is damaged.
        ModelFormatError: the folder's default patch is missing or is another patch.
    """

    default: BoundPatch
    base: BoundPatch

    def __init__(self, ort: Any, folder: ModelFolder, defaults: Patch | None, kept_bytes: int, options: Any) -> None:
        self._ort, self._folder = ort, folder
        self._notes = PrecisionNotes(folder.precision)
        self.values = BoundValuesStore(kept_bytes)
        own = read_default_patch(folder)
        self.repair = own if folder.default_patch and folder.default_patch.repair else None
        if defaults is not None:
            if not isinstance(defaults, Patch):
                raise not_a_patch(defaults, "a Patch, or None")
            check_patch(defaults, folder)
            self._notes.note(defaults)
        default = own if defaults is None else defaults
        self.default_patch = None if default is None or default is self.repair or default.is_base else default
        bound = self.repair if self.default_patch is None else self._repaired(self.default_patch)
        self._bound_default, self._default_identity = bound, None if bound is None else bound.identity
        deltas = {} if bound is None else bound.deltas
        # A session does not give out its initializers, so they are replaced, be it with equal values. The identity of
        # the default patch is then that of the session's own values, whatever the graph or its description state. The
        # session reads these values in place, so they must live as long as the session. Off the CPU it would ignore
        # them, since they are not where the graph's own initializers go; there the default patch is bound for each run.
        self._replaced = options is not None
        self._default_values = self._slot_values(deltas, "cpu") if self._replaced else {}
        for name, value in self._default_values.items():
            options.add_initializer(name, value)
        # Whether a run without values is patched.
        self._has_defaults = bool(deltas) if self._replaced else own is not None

    def place(self, kind: str) -> None:
        """Put the base and the default patch on the device of the open session, `cpu` or `cuda`."""
        self._kind, bound = kind, self._bound_default
        deltas = {} if bound is None else bound.deltas
        bind_all = not self._replaced and (self._has_defaults or bool(deltas))
        values = self._slot_values(deltas, kind) if bind_all else {}
        key = self._folder.graph_digest, () if bound is None else bound.terms
        self.default = self._bound(lambda: values, key, deltas, bound)
        self.base = self._bind_base()

    def bind(self, patch: Patch | None) -> BoundPatch:
        """Check a patch and put it on the device; see `Graph.bind`."""
        if patch is None:
            return self.base
        if not isinstance(patch, Patch):
            raise not_a_patch(patch, "a Patch, or None")
        # This comes first because the fit does not depend on the strength or on the defaults.
        check_patch(patch, self._folder)
        self._notes.note(patch)
        if not patch.terms:
            return self.base
        patch = self._repaired(patch)
        # The identity is computed from the values, so a default that is exported as 0.5 * p is found too.
        if self._default_identity is not None and patch.identity == self._default_identity:
            return self.default
        # If the defaults are rank 0, the slots without a delta need no binding.
        only = None if self._has_defaults else set(patch.deltas)
        deltas, key = patch.deltas, (self._folder.graph_digest, patch.terms)

        def values() -> BoundValues:
            return self.values.get(key, lambda: self._converted(deltas, only))

        values()  # values that the graph's dtype cannot hold are refused now
        return self._bound(values, key, deltas, patch)

    def _bind_base(self) -> BoundPatch:
        terms, deltas = (self.repair.terms, self.repair.deltas) if self.repair else ((), {})
        key = self._folder.graph_digest, terms
        if key == self.default.key:
            return self.default
        values = self._slot_values(deltas, self._kind)
        return BoundPatch(lambda: values, key, deltas=deltas)

    def _bound(
        self,
        values: Callable[[], Mapping[str, Any]],
        key: CacheKey,
        deltas: Mapping[SlotKey, Delta],
        patch: Patch | None,
    ) -> BoundPatch:
        if patch is None or patch.prefix is None:
            return BoundPatch(values, key, deltas=deltas)
        entries = entry_counts(patch.prefix, self._folder.windowed, self._folder.route)
        return BoundPatch(values, key, patch.prefix, deltas, entries)

    def _repaired(self, patch: Patch) -> Patch:
        """Return `patch`, which has at least one term, with the repair added if it needs one; see `Graph.bind`."""
        if self.repair is None or patch.config.precision not in FLOAT_PRECISIONS:
            return patch
        return self.repair + patch

    def _slot_values(self, deltas: Mapping[SlotKey, Delta], kind: str) -> dict[str, Any]:
        return self._on_device(folder_arrays(deltas, self._folder), kind)

    def _converted(self, deltas: Mapping[SlotKey, Delta], only: set[SlotKey] | None) -> BoundValues:
        arrays = folder_arrays(deltas, self._folder, only)
        copied = [array.nbytes for array in arrays.values() if self._kind != "cpu" or not in_bytes(array)]
        return BoundValues(self._on_device(arrays, self._kind), sum(copied))

    def _on_device(self, arrays: Mapping[str, NDArray[Any]], kind: str) -> dict[str, Any]:
        return {name: self._ort.OrtValue.ortvalue_from_numpy(array, kind, 0) for name, array in arrays.items()}

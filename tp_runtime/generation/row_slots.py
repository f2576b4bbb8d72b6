"""The patch tensors of a batch: one patch's own tensors if all rows run under it, and otherwise one row for each.

The tensors of rows under different patches are stacked: a [rows, in, rank], b [rows, rank, out], bias [rows, 1, out].
Ranks are padded with zeros to the slot's largest rank among the rows, which adds exactly nothing. A stack is allocated
when the first two rows differ, and written only for the rows that changed. When the largest rank changes, the stack is
allocated again, because every step pays for the padding of every row. When all rows run under one patch again, a stack
of a higher rank is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..patch import Delta, SlotKey
from ..session import BoundPatch, CacheKey, Slot, as_added, check_rows


class StackedSlots:
    """The tensors that are bound to a graph's slots while rows join and leave.

    Args:
        slots: the graph's slots.
        limit: the largest number of rows.
        dtype: the dtype of the slots.
        to_device: a function that returns an array as an OrtValue on the device; on the CPU the value shares the
            array's memory.
    """

    def __init__(
        self,
        slots: Mapping[SlotKey, Slot],
        limit: int,
        dtype: np.dtype[Any],
        to_device: Callable[[NDArray], Any],
    ) -> None:
        self._slots, self._limit, self._dtype = slots, limit, dtype
        self._to_device = to_device
        self._arrays: dict[SlotKey, tuple[NDArray, NDArray, NDArray]] = {}
        self._bound: Mapping[str, Any] = {}  # the values of the last binding, which must stay alive
        self._written: list[CacheKey | None] = [None] * limit  # the patch whose tensors each row of the stack holds

    def bind(self, binding: Any, bounds: Sequence[BoundPatch]) -> None:
        """Bind the tensors for rows under the patches `bounds`, in order, to a fresh binding.

        Raises:
            PatchShapeError: the tensors of a patch have another number of rows.
        """
        values: Mapping[str, Any]
        if any(bound.key != bounds[0].key for bound in bounds):
            self._write(bounds)
            values = {
                name: self._to_device(array[: len(bounds)])
                for key, arrays in self._arrays.items()
                for name, array in zip(self._slots[key].tensors, arrays, strict=True)
            }
        else:
            values = bounds[0].values
            if any(arrays[0].shape[2] > _rank(bounds[0], key) for key, arrays in self._arrays.items()):
                # Nothing reads the stack now, and it is larger than a stack for these rows would be.
                self._written, self._arrays = [None] * self._limit, {}
        check_rows(values, len(bounds))
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        self._bound = values

    def _write(self, bounds: Sequence[BoundPatch]) -> None:
        count = len(bounds)
        changed = [i for i, bound in enumerate(bounds) if self._written[i] != bound.key]
        deltas = [bound.deltas for bound in bounds]
        for i in (*changed, *range(count, self._limit)):
            self._written[i] = None  # a row is unknown until it is complete, because memory may run out in between
        for key, slot in self._slots.items():
            here = [as_added(each.get(key) or Delta(), slot) for each in deltas]
            a, b, bias = self._stack(key, slot, max(delta.rank for delta in here), count)
            for i in changed:
                delta = here[i]
                a[i, :, delta.rank :], b[i, delta.rank :] = 0, 0
                bias[i, 0] = 0
                places = {"a": a[i, :, : delta.rank], "b": b[i, : delta.rank], "bias": bias[i, 0]}
                for part in places.keys() & delta.tensors.keys():
                    delta.tensors[part].write(places[part])
        for i in changed:
            self._written[i] = bounds[i].key

    def _stack(self, key: SlotKey, slot: Slot, rank: int, count: int) -> tuple[NDArray, NDArray, NDArray]:
        """Return the stack of one slot for exactly `rank`; the first `count` rows keep their contents up to it."""
        old = self._arrays.get(key)
        if old is not None and old[0].shape[2] == rank:
            return old
        a = np.zeros((self._limit, slot.inputs, rank), self._dtype)
        b = np.zeros((self._limit, rank, slot.outputs), self._dtype)
        bias = np.zeros((self._limit, 1, slot.outputs), self._dtype)
        if old is not None:
            kept = min(rank, old[0].shape[2])
            a[:count, :, :kept], b[:count, :kept] = old[0][:count, :, :kept], old[1][:count, :kept]
            bias[:count] = old[2][:count]
        self._arrays[key] = a, b, bias
        return a, b, bias


def _rank(bound: BoundPatch, key: SlotKey) -> int:
    delta = bound.deltas.get(key)
    return 0 if delta is None else delta.rank

"""The keys and values of a batch on another device than the host: rows join, move and leave without crossing the bus.

A row that joins is copied from the buffers of its own cache, and a row that moves from one place to another, by the
device itself (session/device_copies.py). Only what is asked for with `get` comes to the host: one row, for the prefix
cache.

Memory of a device is not given out page by page, so the buffers have places for as many rows as are needed. The number
of places doubles until it suffices. They start anew whenever the batch was empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..session import KV, DeviceCopies, Lengths
from .row_kv import BatchKV


class DeviceKV(BatchKV):
    """The key/value buffers of a batch, on the device of `copies`; the methods are those of StackedKV.

    The arguments are those of BatchKV and this one.

    Args:
        copies: what copies on the device.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        windowed: Set[str],
        shape: KV,
        limit: int,
        window: int,
        copies: DeviceCopies,
    ) -> None:
        super().__init__(names, windowed, shape, limit, window)
        self._copies = copies
        self._buffers: dict[str, Any] = {}

    @property
    def capacities(self) -> Lengths:
        """The numbers of positions that each row has room for; 0 before the first row."""
        if not self._buffers:
            return Lengths(0, 0)
        return Lengths(*(self._buffers[past].shape()[2] for past in self._of_each_kind))

    @property
    def _places(self) -> int:
        """The number of rows that the buffers have room for."""
        return self._buffers[self._of_each_kind[0]].shape()[0] if self._buffers else 0

    def fit(self, lengths: Lengths, count: int) -> None:
        """Make room for `lengths` positions in each row, and give back room that long rows have left behind.

        The contents of the first `count` rows stay, up to `lengths` positions.
        """
        if not count:
            self._buffers = {}
        places, wanted = self._places, self._fitting(lengths)
        if wanted != self.capacities:
            self._resize(wanted, min(count, places), max(1, places))  # a row that failed to join may have no place

    def _resize(self, capacities: Lengths, count: int, places: int) -> None:
        """Allocate the buffers that have another size, and copy the first `count` rows into them."""
        buffers = {}
        for past, _present in self._names:
            size = places, self._shape.heads, self._of(past, capacities), self._shape.head_dim
            old = self._buffers.get(past)
            if old is not None and tuple(old.shape()) == size:
                continue
            buffers[past] = self._copies.new(size)
            if count:
                self._copies.copy(self._copies.rows(old, 0, count), self._copies.rows(buffers[past], 0, count))
        self._buffers = {**self._buffers, **buffers}  # this is the last line, because memory may run out above

    def put(self, place: int, content: Mapping[str, Any]) -> None:
        """Fill a row from OrtValues [1, heads, at least filled, head dim] on the device, by graph input name.

        A row is written to its end, because a kernel may multiply what it then masks.
        """
        if place == self._places:
            self._resize(self.capacities, place, min(self._limit, 2 * place))
        for past, buffer in self._buffers.items():
            target = self._copies.rows(buffer, place, 1)
            if past in content:
                self._copies.copy(self._copies.rows(content[past]), target)
            else:
                self._copies.clear(target)

    def move(self, source: int, place: int, _filled: Lengths) -> None:
        """Copy a row to another place."""
        for buffer in self._buffers.values():
            self._copies.copy(self._copies.rows(buffer, source, 1), self._copies.rows(buffer, place, 1))

    def get(self, row: int, filled: Lengths) -> dict[str, NDArray[Any]]:
        """Return the first positions [heads, filled, head dim] of a row, by graph input name, as arrays on the host."""
        found = {}
        for past, buffer in self._buffers.items():
            target = self._copies.new((1, self._shape.heads, self._of(past, filled), self._shape.head_dim))
            self._copies.copy(self._copies.rows(buffer, row, 1), self._copies.rows(target))
            found[past] = np.asarray(target.numpy())[0]
        return found

    def bind(self, binding: Any, count: int) -> None:
        """Bind the first `count` rows as past and as present."""
        for past, present in self._names:
            self._copies.bind(binding, past, present, self._copies.rows(self._buffers[past], 0, count))

"""The keys and values of a batch: one buffer [rows, heads, capacity, head dim] for each tensor.

The capacity of windowed layers differs from that of full layers if their lengths do (session/layer_kinds.py).

This is the form of the buffers on the host; device_kv.py has them on another device. The rows in use are always the
first ones. ONNX Runtime reads and writes the arrays in place, so these rows are a view of the array and cost nothing.
Unused room costs memory and no time, so the buffers shrink only if most of them is unused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..session import KV, Lengths, grown_capacity

_SHRINK = 4  # buffers shrink if the rows need at most this part of them: the next doubling is then not the next step


def fitting(capacity: int, length: int, window: int) -> int:
    """Return the capacity for `length` positions; it is `capacity` if that suffices and is not far too large."""
    if length > capacity:
        return grown_capacity(capacity, length, window)
    smallest = grown_capacity(0, length, window)
    return smallest if smallest * _SHRINK <= capacity else capacity


class BatchKV(ABC):
    """What the two forms of a batch's buffers share: which tensors there are, and the room that rows need.

    Args:
        names: the names (graph input, graph output) of every key and value tensor.
        windowed: the graph inputs of windowed layers; empty if the graph has one cache length for all layers.
        shape: the number of heads and the head dimension of keys and values.
        limit: the largest number of rows.
        window: the largest number of positions.
    """

    def __init__(
        self, names: Sequence[tuple[str, str]], windowed: Set[str], shape: KV, limit: int, window: int
    ) -> None:
        self._names, self._windowed, self._shape = names, windowed, shape
        self._limit, self._window = limit, window
        full = next(past for past, _present in names if past not in windowed)
        self._of_each_kind = full, next(iter(windowed), full)

    @property
    @abstractmethod
    def capacities(self) -> Lengths:
        """The numbers of positions that each row has room for; 0 before the first row."""

    def has_room(self, lengths: Lengths) -> bool:
        """Whether each row has room for `lengths` positions."""
        return all(length <= capacity for length, capacity in zip(lengths, self.capacities, strict=True))

    def _fitting(self, lengths: Lengths) -> Lengths:
        """Return the capacities for `lengths` positions, which may be those that there are."""
        return Lengths(*(fitting(*pair, self._window) for pair in zip(self.capacities, lengths, strict=True)))

    def _of(self, past: str, lengths: Lengths) -> int:
        return lengths.windowed if past in self._windowed else lengths.full


class StackedKV(BatchKV):
    """The key/value buffers of a batch on the host; the arguments are those of BatchKV and these.

    Args:
        dtype: the dtype of keys and values.
        to_value: a function that returns an array as an OrtValue that shares the array's memory.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        windowed: Set[str],
        shape: KV,
        dtype: np.dtype[Any],
        limit: int,
        window: int,
        to_value: Callable[[NDArray], Any],
    ) -> None:
        super().__init__(names, windowed, shape, limit, window)
        self._dtype, self._to_value = dtype, to_value
        self._arrays: dict[str, NDArray] = {}
        self._values: dict[str, Any] = {}

    @property
    def capacities(self) -> Lengths:
        """The numbers of positions that each row has room for; 0 before the first row."""
        if not self._arrays:
            return Lengths(0, 0)
        return Lengths(*(self._arrays[past].shape[2] for past in self._of_each_kind))

    def fit(self, lengths: Lengths, count: int) -> None:
        """Make room for `lengths` positions in each row, and give back room that long rows have left behind.

        The contents of the first `count` rows stay, up to `lengths` positions.
        """
        before, wanted = self.capacities, self._fitting(lengths)
        if wanted == before:
            return
        arrays = {}
        for past, _present in self._names:
            if self._of(past, wanted) != self._of(past, before):
                size = self._limit, self._shape.heads, self._of(past, wanted), self._shape.head_dim
                arrays[past] = np.zeros(size, self._dtype)
        for past, array in arrays.items():
            kept = min(self._of(past, before), self._of(past, wanted))
            if kept:
                array[:count, :, :kept] = self._arrays[past][:count, :, :kept]
        self._arrays = {**self._arrays, **arrays}  # this is the last line, because memory may run out above

    def put(self, row: int, content: Mapping[str, NDArray]) -> None:
        """Fill the first positions of a row from arrays [heads, filled, head dim], by graph input name."""
        for past, array in content.items():
            self._arrays[past][row, :, : array.shape[1]] = array

    def move(self, source: int, row: int, filled: Lengths) -> None:
        """Copy the first positions of a row to another one."""
        self.put(row, self.get(source, filled))

    def get(self, row: int, filled: Lengths) -> dict[str, NDArray]:
        """Return views [heads, filled, head dim] of the first positions of a row, by graph input name."""
        return {past: array[row, :, : self._of(past, filled)] for past, array in self._arrays.items()}

    def bind(self, binding: Any, count: int) -> None:
        """Bind the first `count` rows as past and as present."""
        for past, present in self._names:
            value = self._values[past] = self._to_value(self._arrays[past][:count])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

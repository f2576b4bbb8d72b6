"""The keys and values of a batch: one buffer [rows, heads, capacity, head dim] for each tensor.

The rows in use are always the first ones. On the CPU, ONNX Runtime reads and writes the arrays in place, so these rows
are a view of the array and cost nothing. Unused room costs memory and no time, so the buffers shrink only if most of
them is unused. On another device, each change of the rows copies the buffers back to the host, changes them there and
sends them to the device again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..session import KV, grown_capacity

_SHRINK = 4  # buffers shrink if the rows need at most this part of them: the next doubling is then not the next step


class StackedKV:
    """The key/value buffers of a batch.

    Args:
        names: the names (graph input, graph output) of every key and value tensor.
        shape: the number of heads and the head dimension of keys and values.
        dtype: the dtype of keys and values.
        limit: the largest number of rows.
        window: the largest number of positions.
        to_device: a function that returns an array as an OrtValue on the device.
        shared: whether such an OrtValue shares the array's memory, as on the CPU.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        shape: KV,
        dtype: np.dtype[Any],
        limit: int,
        window: int,
        to_device: Callable[[NDArray], Any],
        shared: bool,
    ) -> None:
        self._names, self._shape, self._dtype, self._limit, self._window = names, shape, dtype, limit, window
        self._to_device, self._shared = to_device, shared
        self._arrays: dict[str, NDArray] = {}
        self._values: dict[str, Any] = {}

    @property
    def capacity(self) -> int:
        """The number of positions that each row has room for; 0 before the first row."""
        return next(iter(self._arrays.values())).shape[2] if self._arrays else 0

    def fit(self, length: int, count: int) -> None:
        """Make room for `length` positions in each row, and give back room that long rows have left behind.

        The contents of the first `count` rows stay, up to `length` positions.
        """
        capacity = self.capacity
        if length > capacity:
            wanted = grown_capacity(capacity, length, self._window)
        else:
            wanted = grown_capacity(0, length, self._window)
            if wanted * _SHRINK > capacity:
                return
        size, kept = (self._limit, self._shape.heads, wanted, self._shape.head_dim), min(capacity, wanted)
        arrays = {past: np.zeros(size, self._dtype) for past, _present in self._names}
        self.pull()
        for past, array in self._arrays.items():
            arrays[past][:count, :, :kept] = array[:count, :, :kept]
        self._arrays = arrays  # this is the last line, because memory may run out above

    def pull(self) -> None:
        """Copy what the runs wrote back into the arrays. Call this before the arrays are read or changed."""
        if not self._shared:
            for past, value in self._values.items():
                written = value.numpy()
                self._arrays[past][: len(written)] = written
        self._values = {}  # until the next `bind` only the arrays are valid

    def put(self, row: int, content: Mapping[str, NDArray]) -> None:
        """Fill the first positions of a row from arrays [heads, filled, head dim], by graph input name."""
        for past, array in content.items():
            self._arrays[past][row, :, : array.shape[1]] = array

    def get(self, row: int, filled: int) -> dict[str, NDArray]:
        """Return views [heads, filled, head dim] of the first positions of a row, by graph input name."""
        return {past: array[row, :, :filled] for past, array in self._arrays.items()}

    def bind(self, binding: Any, count: int) -> None:
        """Bind the first `count` rows as past and as present."""
        for past, present in self._names:
            value = self._values[past] = self._to_device(self._arrays[past][:count])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

"""Keys and values of a batch: one buffer a tensor, [rows, heads, capacity, head dim], its first rows in use.

On the CPU ONNX Runtime reads and writes the arrays where they lie, so any number of first rows is a view and costs
nothing. On another device each change of rows brings the buffers back, changes them here and sends them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..session import KV, grown_capacity


class StackedKV:
    """The buffers of a batch.

    Args:
        names: (graph input, graph output) of every tensor.
        shape: of one position.
        dtype: of keys and values.
        limit: most rows there can be.
        window: most positions there can be.
        to_device: an array as an OrtValue on the device.
        shared: whether such a value is the array's own memory, as on the CPU.

    Attributes:
        capacity: positions there is room for; 0 before the first row.
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
        self.capacity = 0

    def reserve(self, length: int) -> None:
        """Make room for `length` positions a row; what the rows hold stays."""
        if length <= self.capacity:
            return
        capacity = grown_capacity(self.capacity, length, self._window)
        size = (self._limit, self._shape.heads, capacity, self._shape.head_dim)
        grown = {past: np.zeros(size, self._dtype) for past, _present in self._names}
        self.pull()
        for past, array in self._arrays.items():
            grown[past][:, :, : self.capacity] = array
        self._arrays, self.capacity = grown, capacity  # together: memory may have run out before

    def pull(self) -> None:
        """Bring what the runs wrote back into the arrays; needed before they are read or changed."""
        if not self._shared:
            for past, value in self._values.items():
                written = value.numpy()
                self._arrays[past][: len(written)] = written
        self._values = {}  # the arrays are what counts until the next `bind`

    def put(self, row: int, content: Mapping[str, NDArray]) -> None:
        """Fill the first positions of a row, from [heads, filled, head dim] by graph input name."""
        for past, array in content.items():
            self._arrays[past][row, :, : array.shape[1]] = array

    def get(self, row: int, filled: int) -> dict[str, NDArray]:
        """Views of the first positions of a row, [heads, filled, head dim] by graph input name."""
        return {past: array[row, :, :filled] for past, array in self._arrays.items()}

    def bind(self, binding: Any, count: int) -> None:
        """Bind the first `count` rows as past and as present."""
        for past, present in self._names:
            value = self._values[past] = self._to_device(self._arrays[past][:count])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

"""Several tensors of fixed shapes in one buffer on a device, so that one copy moves them all.

A copy over the bus costs some 10 µs however small it is, and a decode step has three or four numbers to send and two
short arrays to fetch; a captured step's patch has a hundred tensors. The bindings get the addresses of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_ALIGNMENT = 256  # bytes, that of CUDA's own allocations


class PackedTensors:
    """Tensors on a device, all zeros at first.

    A binding that holds their addresses does not keep them alive; its owner does.

    Args:
        ort: the onnxruntime module.
        device: the device, `cuda`, or `cpu` in tests.
        shapes: the shape and the dtype of each tensor, by the name of the graph's input or output.

    Attributes:
        nbytes: the number of bytes of the buffer, which each copy moves.
    """

    def __init__(self, ort: Any, device: str, shapes: Mapping[str, tuple[tuple[int, ...], DTypeLike]]) -> None:
        self._device = device
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        end = 0
        for name, (shape, kind) in shapes.items():
            dtype = np.dtype(kind)
            self._places[name] = end, shape, dtype
            size = prod(shape) * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = max(end, _ALIGNMENT)  # a buffer without tensors, or with empty ones, has an address too
        self._buffer = ort.OrtValue.ortvalue_from_numpy(self.new_memory(), device, 0)

    def new_memory(self) -> NDArray[np.uint8]:
        """Return zeros on the host that `arrays` and `send` take."""
        return np.zeros(self.nbytes, np.uint8)

    def arrays(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the tensors as views of `memory`, which has the bytes of the buffer, by name."""
        return {
            name: memory[start : start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (start, shape, dtype) in self._places.items()
        }

    def address(self, name: str) -> int:
        """Return the address of a tensor on the device."""
        start: int = self._buffer.data_ptr()
        return start + self._places[name][0]

    def send(self, memory: NDArray[np.uint8]) -> None:
        """Copy the bytes of all tensors to the device; they are there when the call returns."""
        self._buffer.update_inplace(memory)

    def fetch(self) -> dict[str, NDArray[Any]]:
        """Copy all tensors to the host."""
        return self.arrays(self._buffer.numpy())

    def bind_inputs(self, binding: Any) -> None:
        """Bind the tensors as inputs."""
        for name, (_start, shape, dtype) in self._places.items():
            binding.bind_input(name, self._device, 0, dtype.type, list(shape), self.address(name))

    def bind_outputs(self, binding: Any) -> None:
        """Bind the tensors as outputs."""
        for name, (_start, shape, dtype) in self._places.items():
            binding.bind_output(name, self._device, 0, dtype.type, list(shape), self.address(name))

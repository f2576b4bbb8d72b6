"""Copies between buffers on one device, which do not pass through the host.

ONNX Runtime's Python interface can allocate a buffer on a device and bind any address to an input or an output, but it
has no function that copies a part of one buffer to a part of another. So a session of its own runs one `Pad` node: a
negative pad crops, and a positive one appends zeros. The node's graph is written here as bytes, because the edge has no
`onnx` package.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .device import Device, create_session

_SOURCE, _PADS, _TARGET = "source", "pads", "target"
_ELEMENTS = {"float32": 1, "float16": 10, "int64": 7}  # of onnx.TensorProto.DataType
_IR_VERSION, _OPSET = 8, 13


class View(NamedTuple):
    """A part of a buffer: a tensor [rows, heads, positions, head dim] that is contiguous in memory.

    Attributes:
        address: the address of its first value.
        shape: its shape.
        buffer: the OrtValue that it is a part of, which must stay alive.
    """

    address: int
    shape: tuple[int, ...]
    buffer: Any


class DeviceCopies:
    """Allocates, clears and copies tensors [rows, heads, positions, head dim] on one device.

    Args:
        ort: the onnxruntime module.
        device: the device of the buffers. On the CPU the same copies run, which is how they are tested.
        dtype: the dtype of the tensors, float32 or float16.

    Raises:
        DeviceUnavailableError: the device is CUDA, and it is not available.
    """

    def __init__(self, ort: Any, device: Device, dtype: np.dtype[Any]) -> None:
        self._ort, self._kind, self._dtype = ort, device.kind, dtype
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session, _device = create_session(copy_graph(dtype), device, options)
        self._zero = self.to_device(np.zeros((1, 1, 1, 1), dtype))

    def to_device(self, array: NDArray[Any]) -> Any:
        """Return a copy of an array on the device, as an OrtValue; on the CPU it may share the array's memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, self._dtype), self._kind, 0)

    def new(self, shape: tuple[int, ...]) -> Any:
        """Return a buffer on the device, as an OrtValue. Its content is undefined."""
        return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), self._dtype, self._kind, 0)

    def rows(self, buffer: Any, first: int = 0, count: int | None = None) -> View:
        """Return `count` rows of a buffer, an OrtValue, from row `first`; None means all rows behind it."""
        rows, *rest = buffer.shape()
        shape = (rows - first if count is None else count, *rest)
        return View(buffer.data_ptr() + first * prod(rest) * self._dtype.itemsize, shape, buffer)

    def copy(self, source: View, target: View, skipped: int = 0) -> None:
        """Copy tensors; what `target` has room for behind the source's positions becomes zero.

        Args:
            source: the tensors to read. Positions that `target` has no room for are left out.
            target: the tensors to write, with the rows, heads and head dimension of `source`.
            skipped: the number of positions at the front of `source` to leave out.
        """
        pads = [0] * 2 * len(target.shape)
        pads[2] = -skipped
        pads[len(target.shape) :] = [wanted - held for wanted, held in zip(target.shape, source.shape, strict=True)]
        pads[len(target.shape) + 2] += skipped
        self._pad(source, pads, target)

    def clear(self, target: View) -> None:
        """Write zeros."""
        zero = self.rows(self._zero)
        self._pad(zero, [0] * len(zero.shape) + [size - 1 for size in target.shape], target)

    def bind(self, binding: Any, past: str, present: str, view: View) -> None:
        """Bind a view to an input and an output of another session on this device."""
        shape = list(view.shape)
        binding.bind_input(past, self._kind, 0, self._dtype, shape, view.address)
        binding.bind_output(present, self._kind, 0, self._dtype, shape, view.address)

    def _pad(self, source: View, pads: list[int], target: View) -> None:
        binding = self._session.io_binding()
        binding.bind_cpu_input(_PADS, np.array(pads, np.int64))
        binding.bind_input(_SOURCE, self._kind, 0, self._dtype, list(source.shape), source.address)
        binding.bind_output(_TARGET, self._kind, 0, self._dtype, list(target.shape), target.address)
        self._session.run_with_iobinding(binding)


# -- the graph -----------------------------------------------------------------------------------------------


def copy_graph(dtype: np.dtype[Any]) -> bytes:
    """Return an ONNX model of one node: target = Pad(source, pads), for tensors of `dtype`.

    The numbers are those of the fields in onnx.proto; a test reads the bytes with the package `onnx`.
    """
    node = _text(1, _SOURCE) + _text(1, _PADS) + _text(2, _TARGET) + _text(4, "Pad")
    graph = _field(1, node) + _text(2, "copy")
    graph += _field(11, _value(_SOURCE, dtype.name, 4)) + _field(11, _value(_PADS, "int64", 1))
    graph += _field(12, _value(_TARGET, dtype.name, 4))
    opset = _text(1, "") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, opset)


def _value(name: str, element: str, rank: int) -> bytes:
    """Return a ValueInfoProto of a tensor with `rank` dimensions of any size."""
    shape = _field(1, b"") * rank
    return _text(1, name) + _field(2, _field(1, _number(1, _ELEMENTS[element]) + _field(2, shape)))


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())


def _field(field: int, content: bytes) -> bytes:
    """Return a field of protobuf with a length in front of its content."""
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])

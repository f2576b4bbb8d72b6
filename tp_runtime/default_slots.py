"""The slots' defaults of a folder exported with a patch, read from its graph without `onnx`.

A session keeps its initializers to itself, and a batch that mixes the default patch with others needs its tensors as
rows. So the graph file is walked here for the tensors of the slots, and for nothing else: a message is (field, value)
pairs, the numbers below are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .delta import Delta
from .errors import ModelFormatError
from .folder import ModelFolder
from .safe_path import REEXPORT, checked_file

_GRAPH, _INITIALIZER = 7, 5  # of a model, of its graph
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14  # of a tensor
_KEY, _VALUE = 1, 2
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2")}


def read_default_deltas(folder: ModelFolder) -> dict[tuple[int, str], Delta]:
    """What the slots of a folder add with nothing bound, by (layer, site).

    Raises:
        ModelFormatError: the graph is not one that the exporter wrote.
        UnsafePathError: it names a file outside the folder.
    """
    wanted = {f"{slot.name}.{part}": (key, part) for key, slot in folder.slots.items() for part in ("a", "b", "bias")}
    found: dict[tuple[int, str], dict[str, NDArray]] = {}
    try:
        model = memoryview((folder.path / "model.onnx").read_bytes())
        (graph,) = (value for field, value in _fields(model) if field == _GRAPH)
        for field, value in _fields(graph):
            if field != _INITIALIZER:
                continue
            tensor = list(_fields(value))
            name = next((bytes(v).decode() for f, v in tensor if f == _NAME), "")
            if name in wanted:
                key, part = wanted.pop(name)
                found.setdefault(key, {})[part] = _array(tensor, folder)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise _unreadable(error) from error
    if wanted:
        raise _unreadable(f"no initializer {next(iter(wanted))}")
    deltas = {}
    for key, parts in found.items():
        pair = parts["a"].size > 0
        deltas[key] = Delta(parts["a"][0] if pair else None, parts["b"][0] if pair else None, parts["bias"][0, 0])
    return deltas


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs: an integer, or the bytes of what has a length."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        length, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(message):
            raise ValueError("a field runs past its message")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _array(tensor: list[tuple[int, Any]], folder: ModelFolder) -> NDArray:
    dims: list[int] = []
    for field, value in tensor:
        if field == _DIMS:  # written packed or one by one
            at = 0
            if isinstance(value, int):
                dims.append(value)
                continue
            while at < len(value):
                size, at = _varint(value, at)
                dims.append(size)
    single = dict(tensor)
    dtype: np.dtype[Any] = _DTYPES[single[_TYPE]]
    if not single.get(_LOCATION):
        return np.frombuffer(single.get(_RAW, b""), dtype).reshape(dims)
    where: dict[str, str] = {}
    for field, value in tensor:
        if field == _EXTERNAL:
            entry = dict(_fields(value))
            where[bytes(entry[_KEY]).decode()] = bytes(entry[_VALUE]).decode()
    file = checked_file(folder.path, where["location"])
    count = int(np.prod(dims))
    return np.fromfile(file, dtype, count, offset=int(where.get("offset", "0"))).reshape(dims)


def _unreadable(got: object) -> ModelFormatError:
    return ModelFormatError(
        "the slots' defaults cannot be read",
        field="model.onnx",
        got=got,
        wanted="an initializer for every part of every slot",
        fix=REEXPORT,
    )

"""The container of tensors in a file: safetensors, checked before anything is read, and written whole or not at all.

A file may come from anywhere. So the header is checked field by field, each kind of damage has its own message, and no
integer of the file is used before it is bounded. Nothing is ever unpickled. Tensors are byte ranges of the file as it
was read, so nothing is copied. This module does not know what a tensor means, or which dtypes its caller accepts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import shown
from .atomic import atomic_file
from .destination import Kind
from .strict_json import StrictJSONError, parse_json_object

MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
_MOST_DIMENSIONS = 3


class SafetensorsError(ValueError):
    """The bytes are not those of a well-formed safetensors file.

    Attributes:
        problem: a clause with a subject, such as "the file is truncated".
        got: what was found.
        wanted: what would have been accepted.
        dtype: whether the fault is a dtype that the caller does not accept.
    """

    def __init__(self, problem: str, got: object, wanted: object, dtype: bool = False) -> None:
        super().__init__(f"{problem}; got {got}")
        self.problem, self.got, self.wanted, self.dtype = problem, got, wanted, dtype


class StoredRange(NamedTuple):
    """Where a tensor is in a file.

    Attributes:
        dtype: its dtype, such as "F32".
        shape: its dimensions, at most three.
        begin: the place of its first byte in the file.
        end: the place behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# -- reading -------------------------------------------------------------------------------------------------


def parse_safetensors(
    raw: bytes, item_bytes: Mapping[str, int], file_bytes: int | None = None
) -> tuple[Any, dict[str, StoredRange]]:
    """Check that the header is well-formed and that its tensors fill the rest of the file exactly.

    Args:
        raw: the bytes of the file, at least up to the end of the header.
        item_bytes: the accepted dtypes, with the number of bytes of a value.
        file_bytes: the number of bytes of the file; None if `raw` is the whole file.

    Returns:
        The value of `__metadata__`, which is not checked, and the place of every tensor, in the order of the header.

    Raises:
        SafetensorsError: the header is damaged.
    """
    whole = len(raw) if file_bytes is None else file_bytes
    if len(raw) < 8:
        _refuse("the file is truncated", f"{len(raw)} bytes", ">= 8 bytes")
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse("the header length is over the limit", length, f"<= {MAX_HEADER_BYTES} bytes")
    if length > len(raw) - 8:
        _refuse("the header length goes past the end of the file", length, f"<= {whole - 8} bytes")
    try:
        header = parse_json_object(raw[8 : 8 + length])
    except StrictJSONError as error:
        _refuse(f"the header {error.problem}", error.got, error.wanted)
    metadata = header.pop("__metadata__", None)
    first = 8 + length
    ranges = {name: _checked_entry(name, entry, first, item_bytes) for name, entry in header.items()}
    position, size = 0, whole - first
    for begin, end, name in sorted((found.begin - first, found.end - first, name) for name, found in ranges.items()):
        if begin < position:
            _refuse(f"tensor {shown(name)} overlaps another", f"begin {begin}", f"begin {position}")
        if begin > position:
            _refuse(f"there is a hole before tensor {shown(name)}", f"begin {begin}", f"begin {position}")
        position = end
    if position > size:
        _refuse("the file is truncated", f"{size} bytes of tensors", f"{position} bytes")
    if position < size:
        _refuse("there are trailing bytes after the tensors", f"{size} bytes", f"{position} bytes")
    return metadata, ranges


def safetensors_metadata(file: Path) -> Any:
    """Return the value of `__metadata__` in a file's header, which is all that is read and checked.

    Raises:
        StrictJSONError: the header is not a JSON object.
        OSError: the operating system refuses to read the file.
    """
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = parse_json_object(handle.read(min(length, MAX_HEADER_BYTES)))
    return header.get("__metadata__")


def _checked_entry(name: str, entry: Any, first: int, item_bytes: Mapping[str, int]) -> StoredRange:
    """Check one tensor's description; `first` is the place of the first tensor's first byte in the file."""
    tensor = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"{tensor} is badly described", shown(entry), "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise SafetensorsError(f"{tensor} has an unsupported dtype", shown(dtype), " | ".join(item_bytes), dtype=True)
    if not _whole_numbers(shape) or len(shape) > _MOST_DIMENSIONS or any(d < 0 for d in shape):
        _refuse(f"{tensor} has a bad shape", shown(shape), "one to three dimensions, none negative")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        _refuse(f"{tensor} has bad offsets", shown(offsets), "[begin, end] with 0 <= begin <= end")
    size = largest = item_bytes[dtype]
    for dimension in shape:
        if dimension > MAX_FILE_BYTES:
            _refuse(f"the size of {tensor} overflows", shape, f"dimensions <= {MAX_FILE_BYTES}")
        size *= dimension
        largest *= max(dimension, 1)  # numpy refuses an empty array whose other dimensions overflow
    if largest > MAX_FILE_BYTES:
        _refuse(f"the size of {tensor} overflows", f"{largest} bytes", f"<= {MAX_FILE_BYTES} bytes")
    if size != offsets[1] - offsets[0]:
        _refuse(f"{tensor} does not fill its byte range", f"{offsets[1] - offsets[0]} bytes", size)
    return StoredRange(dtype, tuple(shape), first + offsets[0], first + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)  # a bool is not a dimension


def _refuse(problem: str, got: object, wanted: object) -> NoReturn:
    raise SafetensorsError(problem, got, wanted)


# -- writing -------------------------------------------------------------------------------------------------


def safetensors_header(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> tuple[bytes, list[str], int]:
    """Return the header of a file.

    Args:
        metadata: the texts of `__metadata__`.
        tensors: the dtype, the shape and the number of bytes of a value of every tensor.

    Returns:
        The header, the names of the tensors in the order of the file, and the number of bytes of all tensors. Wide
        dtypes come first, so that every tensor is aligned, and then the order is that of the names.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(tensors, key=lambda name: (-tensors[name][2], name))
    position = 0
    for name in order:
        dtype, shape, item = tensors[name]
        count = item
        for dimension in shape:
            count *= dimension
        span = [position, position := position + count]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors start on a multiple of 8 bytes, as with other writers.
    return text + b" " * (-len(text) % 8), order, position


def write_safetensors(file: Path, header: bytes, blobs: Iterable[Any], replaces: Kind) -> None:
    """Write a file, whole or not at all.

    The file is written here and not by safetensors.serialize, whose signature differs between versions.

    Args:
        file: the file to write.
        header: the header, from `safetensors_header`.
        blobs: the bytes of the tensors in its order, or arrays whose memory is these bytes.
        replaces: the kind of file that may be replaced.

    Raises:
        OutputError: `file` holds something of another kind.
        OSError: the operating system refuses the write, for example because the disk is full. No file is left behind.
    """
    with atomic_file(file, replaces=replaces) as temporary, temporary.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.writelines(blobs)

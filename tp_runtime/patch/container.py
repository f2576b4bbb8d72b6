"""The container of a patch file: safetensors, which is checked before it is parsed and written whole or not at all.

A file may come from anywhere. So this module checks the header field by field before the safetensors library parses
the container. Each kind of damage has its own message, and no integer of the file is used before it is bounded. The
file is opened once and read once. Nothing is ever unpickled. This module does not know which tensors a patch has.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import PatchFormatError, library_errors, shown
from ..storage import Kind, StrictJSONError, UnreadableFileError, atomic_file, parse_json_object, read_regular
from .dtypes import FLOATS, ITEM_BYTES, decode, encode
from .kind import MAX_HEADER_BYTES

MAX_FILE_BYTES = 4 << 30

_UNSAFE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".zip", ".gz", ".tar")
_UNSAFE_MAGIC = {b"PK": "zip, .pt or .npz", b"\x80": "pickle", b"\x1f\x8b": "gzip", b"\x93NUMPY": ".npy"}
# There is nothing at the path. Any other error of the system is raised unchanged.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_COPY_AGAIN = "the file is damaged or is not a patch: copy or export it again"


class StoredTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        dtype: its dtype in the file, a key of `ITEM_BYTES`.
        values: int8 values for I8, float32 values for every other dtype.
    """

    dtype: str
    values: NDArray[Any]

    def rounded(self, name: str) -> StoredTensor:
        """Return the tensor with the values that the file holds.

        Raises:
            PatchValueError: a value does not fit the dtype; `name` is the tensor's name for the error.
        """
        return StoredTensor(self.dtype, decode(encode(self.values, self.dtype, name), self.dtype, [*self.values.shape]))


StoredTensors = dict[str, StoredTensor]
"""The tensors of a file by name."""


# -- reading -------------------------------------------------------------------------------------------------


def read_tensors(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """Read a safetensors file of another tool, such as a LoRA adapter, with the same checks.

    Args:
        path: a regular file, or a symlink to one.

    Returns:
        The float32 arrays by name, of at most three dimensions.

    Raises:
        PatchFormatError: the file is not a well-formed safetensors file, its type is one that is never opened, or a
            tensor is not f16, bf16 or f32. An int8 tensor is refused, because its scales are not known.
        OSError: the operating system refuses to read an existing file, for example because of its permissions.
    """
    file = Path(path)
    raw = read_file(file)
    checked_header(raw, file, FLOATS)
    return {name: tensor.values for name, tensor in stored_tensors(raw, file).items()}


def read_file(file: Path) -> bytes:
    """Return all bytes of a regular file that may be a safetensors file. A FIFO is refused instead of waited for.

    Raises:
        PatchFormatError: there is no such file, it is too large, or its name has the suffix of an unsafe format.
        OSError: the operating system refuses to read an existing file, for example because of its permissions.
    """
    if file.suffix.lower() in _UNSAFE_SUFFIXES:
        _refuse_unsafe(file, f"a {file.suffix} file")
    try:
        return read_regular(file, MAX_FILE_BYTES)
    except UnreadableFileError as error:
        malformed(file, error.problem, error.got, error.wanted, "check the path")
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        malformed(file, "there is no such file", error.strerror, "a .safetensors patch file", "check the path")


def checked_header(raw: bytes, file: Path, dtypes: Collection[str]) -> dict[str, Any]:
    """Return the header, after a check that its tensors are well described and fill the rest of the file exactly.

    Args:
        raw: the bytes of the file.
        file: where they are from, for errors.
        dtypes: the accepted dtypes.

    Raises:
        PatchFormatError: the file is in an unsafe format, or its header is damaged.
    """
    _refuse_other_kinds(raw, file)
    if len(raw) < 8:
        malformed(file, "the file is truncated", f"{len(raw)} bytes", ">= 8 bytes")
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES:
        malformed(file, "the header length is over the limit", length, f"<= {MAX_HEADER_BYTES} bytes")
    if length > len(raw) - 8:
        malformed(file, "the header length goes past the end of the file", length, f"<= {len(raw) - 8} bytes")
    header = json_object(raw[8 : 8 + length], file, "header")
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            spans.append((*_checked_entry(name, entry, file, dtypes), name))
    position, size = 0, len(raw) - 8 - length
    for begin, end, name in sorted(spans):
        if begin < position:
            malformed(file, f"tensor {shown(name)} overlaps another", f"begin {begin}", f"begin {position}")
        if begin > position:
            malformed(file, f"there is a hole before tensor {shown(name)}", f"begin {begin}", f"begin {position}")
        position = end
    if position > size:
        malformed(file, "the file is truncated", f"{size} bytes of tensors", f"{position} bytes")
    if position < size:
        malformed(file, "there are trailing bytes after the tensors", f"{size} bytes", f"{position} bytes")
    return header


def stored_tensors(raw: bytes, file: Path) -> StoredTensors:
    """Return the tensors of a file whose header was checked."""
    problem, wanted = "the safetensors library refuses the file", "a valid safetensors file"
    with library_errors(PatchFormatError, problem, field=str(file), wanted=wanted, fix=_COPY_AGAIN):
        tensors = safetensors.deserialize(raw)
    return {
        name: StoredTensor(tensor["dtype"], decode(tensor["data"], tensor["dtype"], tensor["shape"]))
        for name, tensor in tensors
    }


def _refuse_other_kinds(raw: bytes, file: Path) -> None:
    # The length field of a header of 384 bytes starts like a pickle (0x80 0x01). So a file that begins with a plausible
    # length and "{" counts as a safetensors file and is checked as one.
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= MAX_HEADER_BYTES:
        return
    for magic, kind in _UNSAFE_MAGIC.items():
        if raw.startswith(magic):
            _refuse_unsafe(file, f"{kind} content")


def _checked_entry(name: str, entry: Any, file: Path, dtypes: Collection[str]) -> tuple[int, int]:
    """Check one tensor's description and return its byte range."""
    tensor = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        malformed(file, f"{tensor} is badly described", shown(entry), "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        malformed(
            file,
            f"{tensor} has an unsupported dtype",
            shown(dtype),
            " | ".join(dtypes),
            "convert the tensors to one of these",
        )
    if not _whole_numbers(shape) or len(shape) > 3 or any(d < 0 for d in shape):
        malformed(file, f"{tensor} has a bad shape", shown(shape), "one to three dimensions, none negative")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        malformed(file, f"{tensor} has bad offsets", shown(offsets), "[begin, end] with 0 <= begin <= end")
    size = largest = ITEM_BYTES[dtype]
    for dimension in shape:
        if dimension > MAX_FILE_BYTES:
            malformed(file, f"the size of {tensor} overflows", shape, f"dimensions <= {MAX_FILE_BYTES}")
        size *= dimension
        largest *= max(dimension, 1)  # numpy refuses an empty array whose other dimensions overflow
    if largest > MAX_FILE_BYTES:
        malformed(file, f"the size of {tensor} overflows", f"{largest} bytes", f"<= {MAX_FILE_BYTES} bytes")
    if size != offsets[1] - offsets[0]:
        malformed(file, f"{tensor} does not fill its byte range", f"{offsets[1] - offsets[0]} bytes", size)
    return offsets[0], offsets[1]


def json_object(raw: bytes | str, file: Path, what: str) -> dict[str, Any]:
    """Return the JSON object that `raw` holds; `what` names it in errors: "header" or "config"."""
    try:
        return parse_json_object(raw)
    except StrictJSONError as error:
        malformed(file, f"the {what} {error.problem}", error.got, error.wanted)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)  # a bool is not a dimension


def malformed(file: Path, problem: str, got: object, wanted: object, fix: str = _COPY_AGAIN) -> NoReturn:
    """Raise PatchFormatError about a file."""
    raise PatchFormatError(problem, field=str(file), got=got, wanted=wanted, fix=fix)


def _refuse_unsafe(file: Path, got: str) -> NoReturn:
    malformed(
        file,
        "the file has an unsafe format, which can run code when opened or hides its contents, so it was not opened",
        got,
        "a .safetensors patch file",
        "export the patch with tp-export, or, if you trust the file, convert its tensors to .safetensors",
    )


# -- writing -------------------------------------------------------------------------------------------------


def write_container(file: Path, metadata: Mapping[str, str], tensors: StoredTensors, replaces: Kind) -> None:
    """Write a safetensors file, whole or not at all. Equal contents give equal bytes.

    This function writes the container itself. It does not call safetensors.serialize, because that function's signature
    differs between the supported versions (the newest takes raw pointers).

    Args:
        file: the file to write.
        metadata: the texts of the header's `__metadata__`.
        tensors: the tensors.
        replaces: the kind of file that may be replaced.

    Raises:
        PatchFormatError: the file would have more bytes than the reader accepts.
        PatchValueError: a value does not fit its dtype.
        OutputError: `file` holds something of another kind.
        OSError: the operating system refuses the write, for example because the disk is full. No file is left behind.
    """
    header, size = _header(metadata, tensors)
    if len(header) > MAX_HEADER_BYTES or 8 + len(header) + size > MAX_FILE_BYTES:
        got = f"{len(header)} bytes of header, {size} of tensors"
        wanted = f"<= {MAX_HEADER_BYTES} of header, <= {MAX_FILE_BYTES} in all"
        malformed(file, "the patch is too large", got, wanted, "truncate it to a lower rank")
    blobs = [encode(tensors[name].values, tensors[name].dtype, name) for name in _in_order(tensors)]
    with atomic_file(file, replaces=replaces) as temporary, temporary.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.writelines(blobs)


def container_bytes(metadata: Mapping[str, str], tensors: StoredTensors) -> int:
    """Return the number of bytes that `write_container` writes."""
    header, size = _header(metadata, tensors)
    return 8 + len(header) + size


def _header(metadata: Mapping[str, str], tensors: StoredTensors) -> tuple[bytes, int]:
    """Return the header, and the number of bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name in _in_order(tensors):
        dtype, values = tensors[name]
        span = [position, position := position + values.size * ITEM_BYTES[dtype]]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), position  # the tensors start on a multiple of 8 bytes, as with other writers


def _in_order(tensors: StoredTensors) -> list[str]:
    """Return the names in the order of the file: wide dtypes first, so that every tensor is aligned, then by name."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))

"""The container of a patch file: safetensors of bounded size, whose tensors become arrays.

A file may come from anywhere. The storage room checks the container before anything is read from it; this module opens
the file once, reads it once, and says in its errors what a patch file has to be. It does not know which tensors a patch
has.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchFormatError
from ..storage import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    NO_FILE,
    Kind,
    SafetensorsError,
    StoredRange,
    StrictJSONError,
    UnreadableFileError,
    parse_json_object,
    parse_safetensors,
    read_regular,
    safetensors_header,
    write_safetensors,
)
from .dtypes import FLOATS, ITEM_BYTES, encode, stored_view
from .tensors import FileTensor

_UNSAFE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".zip", ".gz", ".tar")
_UNSAFE_MAGIC = {b"PK": "zip, .pt or .npz", b"\x80": "pickle", b"\x1f\x8b": "gzip", b"\x93NUMPY": ".npy"}
_COPY_AGAIN = "the file is damaged or is not a patch: copy or export it again"


class StoredTensor(NamedTuple):
    """A tensor to write to a file.

    Attributes:
        dtype: its dtype in the file, a key of `ITEM_BYTES`.
        values: int8 values for I8, uint8 values for U8, float32 values for every other dtype.
    """

    dtype: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""
        return self.values.shape

    def rounded(self, name: str) -> FileTensor:
        """Return the tensor as the file holds it.

        Raises:
            PatchValueError: a value does not fit the dtype; `name` is the tensor's name for the error.
        """
        raw = encode(self.values, self.dtype, name)
        return FileTensor(self.dtype, stored_view(raw, StoredRange(self.dtype, self.values.shape, 0, len(raw))))


StoredTensors = dict[str, StoredTensor]
"""The tensors to write to a file, by name."""
FileTensors = dict[str, FileTensor]
"""The tensors of a file by name, the scales of quantised tensors among them."""


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
    _metadata, ranges = checked_header(raw, file, FLOATS)
    return {name: tensor.float32() for name, tensor in file_tensors(raw, ranges).items()}


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
        if error.errno not in NO_FILE:
            raise
        malformed(file, "there is no such file", error.strerror, "a .safetensors patch file", "check the path")


def checked_header(raw: bytes, file: Path, dtypes: Collection[str]) -> tuple[Any, dict[str, StoredRange]]:
    """Return the metadata and the place of every tensor, after a check that they fill the rest of the file exactly.

    Args:
        raw: the bytes of the file.
        file: where they are from, for errors.
        dtypes: the accepted dtypes.

    Raises:
        PatchFormatError: the file is in an unsafe format, or its header is damaged.
    """
    _refuse_other_kinds(raw, file)
    try:
        return parse_safetensors(raw, {dtype: ITEM_BYTES[dtype] for dtype in dtypes})
    except SafetensorsError as error:
        fix = "convert the tensors to one of these" if error.dtype else _COPY_AGAIN
        malformed(file, error.problem, error.got, error.wanted, fix)


def file_tensors(raw: bytes, ranges: Mapping[str, StoredRange]) -> FileTensors:
    """Return the tensors of a file whose header was checked; they share the memory of `raw`."""
    return {name: FileTensor(place.dtype, stored_view(raw, place)) for name, place in ranges.items()}


def _refuse_other_kinds(raw: bytes, file: Path) -> None:
    # The length field of a header of 384 bytes starts like a pickle (0x80 0x01). So a file that begins with a plausible
    # length and "{" counts as a safetensors file and is checked as one.
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= MAX_HEADER_BYTES:
        return
    for magic, kind in _UNSAFE_MAGIC.items():
        if raw.startswith(magic):
            _refuse_unsafe(file, f"{kind} content")


def json_object(raw: bytes | str, file: Path, what: str) -> dict[str, Any]:
    """Return the JSON object that `raw` holds; `what` names it in errors: "header" or "config"."""
    try:
        return parse_json_object(raw)
    except StrictJSONError as error:
        malformed(file, f"the {what} {error.problem}", error.got, error.wanted)


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
    header, order, size = _header(metadata, tensors)
    if len(header) > MAX_HEADER_BYTES or 8 + len(header) + size > MAX_FILE_BYTES:
        got = f"{len(header)} bytes of header, {size} of tensors"
        wanted = f"<= {MAX_HEADER_BYTES} of header, <= {MAX_FILE_BYTES} in all"
        malformed(file, "the patch is too large", got, wanted, "truncate it to a lower rank")
    blobs = [encode(tensors[name].values, tensors[name].dtype, name) for name in order]
    write_safetensors(file, header, blobs, replaces)


def container_bytes(metadata: Mapping[str, str], tensors: StoredTensors) -> int:
    """Return the number of bytes that `write_container` writes."""
    header, _order, size = _header(metadata, tensors)
    return 8 + len(header) + size


def _header(metadata: Mapping[str, str], tensors: StoredTensors) -> tuple[bytes, list[str], int]:
    described = {name: (dtype, values.shape, ITEM_BYTES[dtype]) for name, (dtype, values) in tensors.items()}
    return safetensors_header(metadata, described)

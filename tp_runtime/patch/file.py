"""The patch file: one .safetensors file, which is checked before it is parsed and written whole or not at all.

A patch may come from anywhere. So this module checks the header field by field before the safetensors library parses
the container. Each kind of damage has its own message, and no integer of the file is used before it is bounded. The
file is opened once and read once. Nothing is ever unpickled. This module handles the layout (dtypes, metadata; names.py
the names). It does not handle the meaning of a patch, the sum of patches, or the contents of the config.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import PatchFormatError, PatchTargetError, PatchValueError, PatchVersionError, library_errors, shown
from ..storage import StrictJSONError, UnreadableFileError, atomic_file, parse_json_object, read_regular
from .kind import FORMAT, MAX_HEADER_BYTES, PATCH_FILE
from .names import EntryKey, SlotKey, parse_entry_name, parse_slot_name

DeltaArrays = dict[SlotKey, dict[str, NDArray[np.float32]]]
"""The arrays of each slot's delta, by part ("a" | "b" | "bias" | "mean")."""
EntryArrays = dict[EntryKey, NDArray[np.float32]]
"""The arrays of the KV prefix."""

# Version 1 holds deltas. Version 2 also holds a KV prefix; it is written only if there is one.
VERSIONS = ("1", "2")
METADATA_KEYS = ("format", "version", "config")
DTYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32"}

MAX_FILE_BYTES = 4 << 30

_LARGEST = {"f16": "65504", "bf16": "3.38953e38", "f32": "3.40282e38"}
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_UNSAFE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".zip", ".gz", ".tar")
_UNSAFE_MAGIC = {b"PK": "zip, .pt or .npz", b"\x80": "pickle", b"\x1f\x8b": "gzip", b"\x93NUMPY": ".npy"}
# There is nothing at the path. Any other error of the system is raised unchanged.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_COPY_AGAIN = "the file is damaged or is not a patch: copy or export it again"


# -- reading -------------------------------------------------------------------------------------------------


def read_patch(path: str | os.PathLike[str]) -> tuple[DeltaArrays, EntryArrays, dict[str, Any]]:
    """Read a patch file of any of the `VERSIONS`.

    Args:
        path: a regular file, or a symlink to one.

    Returns:
        The tensors of the slots as float32, with the shapes [in, rank] | [rank, out] | [out] | [in] as stored; the
        tensors of the KV prefix [entries, heads, head dim]; and the parsed config object. The shapes, the values and
        the config's keys are not yet checked against each other: `Patch.load` does that.

    Raises:
        PatchFormatError: the file is not a well-formed safetensors patch file.
        PatchVersionError: the file has a version or a metadata key that this version of tp-runtime does not know.
        PatchTargetError: a tensor's name is neither `layers.<i>.<site>.a|b|bias|mean` nor `prefix.<i>.key|value`,
            or there is no tensor.
        OSError: the operating system refuses to read an existing file, for example because of its permissions.
    """
    file = Path(path)
    _refuse_unsafe_suffix(file)
    return parse_patch(_read_once(file), file)


def parse_patch(raw: bytes, file: Path) -> tuple[DeltaArrays, EntryArrays, dict[str, Any]]:
    """Parse the bytes of a patch file.

    Args:
        raw: the bytes.
        file: where they are from, for errors.

    Returns:
        What `read_patch` returns.

    Raises:
        PatchFormatError, PatchVersionError, PatchTargetError: as for `read_patch`.
    """
    _refuse_other_kinds(raw, file)
    header = _checked_header(raw, file)
    config = _checked_metadata(header.get("__metadata__"), file)
    deltas: DeltaArrays = {}
    entries: EntryArrays = {}
    for name, values in _decoded(raw, file).items():
        if entry := parse_entry_name(name):
            entries[entry] = values
        else:
            slot, part = parse_slot_name(name)
            deltas.setdefault(slot, {})[part] = values
    version, wanted = header["__metadata__"]["version"], VERSIONS[bool(entries) or "prefix" in config]
    if version != wanted:
        problem = f"the version does not fit a file with {'a' if wanted == '2' else 'no'} KV prefix"
        _malformed(file, problem, repr(version), repr(wanted), "export the patch again")
    if not deltas and not entries:
        raise PatchTargetError(
            "the patch holds no delta",
            field=str(file),
            got="0 tensors",
            wanted="at least one layers.<i>.<site>.a|b|bias",
            fix="export the patch again",
        )
    return deltas, entries, config


def read_tensors(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """Read a safetensors file of another tool, such as a LoRA adapter, with the same checks.

    Args:
        path: a regular file, or a symlink to one.

    Returns:
        The float32 arrays by name, of at most three dimensions.

    Raises:
        PatchFormatError: the file is not a well-formed safetensors file, its type is one that is never opened, or a
            tensor is not f16, bf16 or f32.
        OSError: the operating system refuses to read an existing file, for example because of its permissions.
    """
    file = Path(path)
    _refuse_unsafe_suffix(file)
    raw = _read_once(file)
    _refuse_other_kinds(raw, file)
    _checked_header(raw, file)  # a check that every tensor lies in the file
    return _decoded(raw, file)


def _refuse_unsafe_suffix(file: Path) -> None:
    if file.suffix.lower() in _UNSAFE_SUFFIXES:
        _refuse_unsafe(file, f"a {file.suffix} file")


def _decoded(raw: bytes, file: Path) -> dict[str, NDArray[np.float32]]:
    problem, wanted = "the safetensors library refuses the file", "a valid safetensors file"
    with library_errors(PatchFormatError, problem, field=str(file), wanted=wanted, fix=_COPY_AGAIN):
        tensors = safetensors.deserialize(raw)
    return {name: _decode(tensor["data"], tensor["dtype"], tensor["shape"]) for name, tensor in tensors}


def _read_once(file: Path) -> bytes:
    """Return all bytes of a regular file. A FIFO is refused instead of waited for."""
    try:
        return read_regular(file, MAX_FILE_BYTES)
    except UnreadableFileError as error:
        _malformed(file, error.problem, error.got, error.wanted, "check the path")
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        _malformed(file, "there is no such file", error.strerror, "a .safetensors patch file", "check the path")


def _refuse_other_kinds(raw: bytes, file: Path) -> None:
    # The length field of a header of 384 bytes starts like a pickle (0x80 0x01). So a file that begins with a plausible
    # length and "{" counts as a safetensors file and is checked as one.
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= MAX_HEADER_BYTES:
        return
    for magic, kind in _UNSAFE_MAGIC.items():
        if raw.startswith(magic):
            _refuse_unsafe(file, f"{kind} content")


def _checked_header(raw: bytes, file: Path) -> dict[str, Any]:
    """Return the header, after a check that its tensors are well described and fill the rest of the file exactly."""
    if len(raw) < 8:
        _malformed(file, "the file is truncated", f"{len(raw)} bytes", ">= 8 bytes")
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES:
        _malformed(file, "the header length is over the limit", length, f"<= {MAX_HEADER_BYTES} bytes")
    if length > len(raw) - 8:
        _malformed(file, "the header length goes past the end of the file", length, f"<= {len(raw) - 8} bytes")
    header = _json_object(raw[8 : 8 + length], file, "header")
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            spans.append((*_checked_entry(name, entry, file), name))
    position, size = 0, len(raw) - 8 - length
    for begin, end, name in sorted(spans):
        if begin < position:
            _malformed(file, f"tensor {shown(name)} overlaps another", f"begin {begin}", f"begin {position}")
        if begin > position:
            _malformed(file, f"there is a hole before tensor {shown(name)}", f"begin {begin}", f"begin {position}")
        position = end
    if position > size:
        _malformed(file, "the file is truncated", f"{size} bytes of tensors", f"{position} bytes")
    if position < size:
        _malformed(file, "there are trailing bytes after the tensors", f"{size} bytes", f"{position} bytes")
    return header


def _checked_entry(name: str, entry: Any, file: Path) -> tuple[int, int]:
    """Check one tensor's description and return its byte range."""
    tensor = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _malformed(file, f"{tensor} is badly described", shown(entry), "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _malformed(
            file,
            f"{tensor} has an unsupported dtype",
            shown(dtype),
            " | ".join(_ITEM_BYTES),
            "convert the tensors to one of these",
        )
    if not _whole_numbers(shape) or len(shape) > 3 or any(d < 0 for d in shape):
        _malformed(file, f"{tensor} has a bad shape", shown(shape), "one to three dimensions, none negative")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        _malformed(file, f"{tensor} has bad offsets", shown(offsets), "[begin, end] with 0 <= begin <= end")
    size = largest = _ITEM_BYTES[dtype]
    for dimension in shape:
        if dimension > MAX_FILE_BYTES:
            _malformed(file, f"the size of {tensor} overflows", shape, f"dimensions <= {MAX_FILE_BYTES}")
        size *= dimension
        largest *= max(dimension, 1)  # numpy refuses an empty array whose other dimensions overflow
    if largest > MAX_FILE_BYTES:
        _malformed(file, f"the size of {tensor} overflows", f"{largest} bytes", f"<= {MAX_FILE_BYTES} bytes")
    if size != offsets[1] - offsets[0]:
        _malformed(file, f"{tensor} does not fill its byte range", f"{offsets[1] - offsets[0]} bytes", size)
    return offsets[0], offsets[1]


def _checked_metadata(metadata: Any, file: Path) -> dict[str, Any]:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = metadata.get("format") if isinstance(metadata, dict) else metadata
        _malformed(
            file,
            "the file is a safetensors file, but not a patch",
            f"format {shown(got)}",
            f"format {FORMAT!r}",
            "make a patch with tp-export",
        )
    if metadata.get("version") not in VERSIONS:
        raise PatchVersionError(
            "the patch file has an unknown version",
            field=str(file),
            got=shown(metadata.get("version")),
            wanted=" | ".join(map(repr, VERSIONS)),
            fix="update tp-runtime",
        )
    unknown = sorted(set(metadata) - set(METADATA_KEYS))
    if unknown:
        raise PatchVersionError(
            "the patch file has an unknown metadata key",
            field=str(file),
            got=", ".join(map(repr, unknown[:5])),
            wanted=", ".join(METADATA_KEYS),
            fix="update tp-runtime: a newer version may have written this patch",
        )
    if not isinstance(metadata.get("config"), str):
        _malformed(file, "the patch has no config", shown(metadata.get("config")), "a JSON text")
    return _json_object(metadata["config"], file, "config")


def _json_object(raw: bytes | str, file: Path, what: str) -> dict[str, Any]:
    """Return the JSON object that `raw` holds; `what` names it in errors: "header" or "config"."""
    try:
        return parse_json_object(raw)
    except StrictJSONError as error:
        _malformed(file, f"the {what} {error.problem}", error.got, error.wanted)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)  # a bool is not a dimension


def _malformed(file: Path, problem: str, got: object, wanted: object, fix: str = _COPY_AGAIN) -> NoReturn:
    raise PatchFormatError(problem, field=str(file), got=got, wanted=wanted, fix=fix)


def _refuse_unsafe(file: Path, got: str) -> NoReturn:
    _malformed(
        file,
        "the file has an unsafe format, which can run code when opened or hides its contents, so it was not opened",
        got,
        "a .safetensors patch file",
        "export the patch with tp-export, or, if you trust the file, convert its tensors to .safetensors",
    )


# -- dtypes: numpy has no bfloat16, which is the upper half of a float32 -------------------------------------


def _decode(data: bytes, dtype: str, shape: list[int]) -> NDArray[np.float32]:
    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(np.float32)
    return values.reshape(shape)


def _encode(values: NDArray[np.float32], dtype: str, name: str) -> bytes:
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Round to nearest, ties to even: add just under half of the last kept bit, and the last kept bit itself.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        fits = bool(np.all((rounded & 0x7F80) != 0x7F80))
        raw = rounded.astype("<u2").tobytes()
    else:
        with np.errstate(over="ignore"):  # the error below reports it with the tensor's name
            stored = values.astype("<f2" if dtype == "f16" else "<f4")
        fits = bool(np.isfinite(stored).all())
        raw = stored.tobytes()
    if not fits:
        raise PatchValueError(
            f"a value does not fit {dtype}",
            field=name,
            got=f"magnitude {np.abs(values).max():.6g}",
            wanted=f"magnitude <= {_LARGEST[dtype]}",
            fix="save with dtype='bf16' or 'f32'" if dtype == "f16" else "save with dtype='f32'",
        )
    return raw


# -- writing -------------------------------------------------------------------------------------------------


def write_patch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[np.float32]],
    config: Mapping[str, Any],
    dtype: str,
) -> None:
    """Write a patch file, whole or not at all. Equal contents give equal bytes.

    This function writes the container itself. It does not call safetensors.serialize, because that function's signature
    differs between the supported versions (the newest takes raw pointers).

    Args:
        path: the file to write, which ends in .safetensors. An existing file is replaced if it is a patch file.
        tensors: the float32 arrays, by the names that `slot_name` and `entry_name` give.
        config: the JSON object for the metadata.
        dtype: the dtype of every tensor: "f16", "bf16" or "f32".

    Raises:
        PatchFormatError: `dtype` is unknown, `path` has another suffix, or the file would have more bytes than the
            reader accepts.
        PatchValueError: a value does not fit `dtype`.
        OutputError: `path` holds something that is not a patch file.
        OSError: the operating system refuses the write, for example because the disk is full. No file is left behind.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        fix = f"save as {file.name}.safetensors"
        _malformed(file, "the file's name does not end in .safetensors", repr(file.suffix), ".safetensors", fix)
    if dtype not in DTYPES:
        _malformed(file, "the dtype is unknown", repr(dtype), " | ".join(DTYPES), "choose one of these")
    version = VERSIONS["prefix" in config]
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "version": version, "config": json.dumps(config, allow_nan=False)}
    }
    blobs, position = [], 0
    for name in sorted(tensors):
        blobs.append(_encode(tensors[name], dtype, name))
        span = [position, position := position + len(blobs[-1])]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(tensors[name].shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start on a multiple of 8 bytes, as with other writers
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + position > MAX_FILE_BYTES:
        size = f"{len(text)} bytes of header, {position} of tensors"
        wanted = f"<= {MAX_HEADER_BYTES} of header, <= {MAX_FILE_BYTES} in all"
        _malformed(file, "the patch is too large", size, wanted, "truncate it to a lower rank")
    with atomic_file(file, replaces=PATCH_FILE) as temporary, temporary.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.writelines(blobs)

"""The patch file: one .safetensors file, read with suspicion and written whole.

A patch may come from anywhere, so the header is checked here, field by field, before the safetensors library
parses the container: each kind of damage has its own message, and no integer of the file is used before it is
bounded. The file is opened once and read once. Nothing is ever unpickled. Knows the layout (names, dtypes,
metadata); knows nothing of what a patch means, how patches add up, or what the config holds.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import PatchFormatError, PatchTargetError, PatchValueError, PatchVersionError
from ..storage import StrictJSONError, atomic_file, parse_json_object

Slots = dict[tuple[int, str], dict[str, NDArray[np.float32]]]
"""(layer, site) to part ("a" | "b" | "bias" | "mean") to array."""
Entries = dict[tuple[int, str], NDArray[np.float32]]
"""(layer, "key" | "value") to array: the KV prefix."""

SITES = ("mlp_out", "gate", "up", "gate_up", "q", "k", "v", "qkv", "o", "down")
DELTA_PARTS = ("a", "b", "bias", "mean")
FORMAT = "tp-patch"
# 1: deltas. 2: also a KV prefix; written only where there is one.
VERSIONS = ("1", "2")
METADATA_KEYS = ("format", "version", "config")
DTYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32"}

MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
MAX_LAYER = 99_999

_LARGEST = {"f16": "65504", "bf16": "3.38953e38", "f32": "3.40282e38"}
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(a|b|bias|mean)")
_ENTRY = re.compile(r"prefix\.(0|[1-9][0-9]{0,4})\.(key|value)")
_UNSAFE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".zip", ".gz", ".tar")
_UNSAFE_MAGIC = {b"PK": "zip, .pt or .npz", b"\x80": "pickle", b"\x1f\x8b": "gzip", b"\x93NUMPY": ".npy"}
# Nothing at the path, or (ENXIO, ENODEV) a socket or dead device; any other error is the system's to explain.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV)
_COPY_AGAIN = "the file is damaged or is not a patch: copy or export it again"


def slot_name(layer: int, site: str, part: str) -> str:
    """The tensor name of one part of one slot, e.g. "layers.3.mlp_out.a"."""
    return f"layers.{layer}.{site}.{part}"


def entry_name(layer: int, part: str) -> str:
    """The tensor name of one layer's keys or values in the KV prefix, e.g. "prefix.3.key"."""
    return f"prefix.{layer}.{part}"


# -- reading -------------------------------------------------------------------------------------------------


def read_patch(path: str | os.PathLike[str]) -> tuple[Slots, Entries, dict[str, Any]]:
    """Read a patch file of any of the `VERSIONS`.

    Args:
        path: a regular file, or a symlink to one.

    Returns:
        The tensors as float32, [in, rank] | [rank, out] | [out] | [in] as stored, those of the KV prefix
        [entries, heads, head dim], and the parsed config object. Neither shapes nor values nor the config's keys
        have been checked against each other: `Patch.load` does that.

    Raises:
        PatchFormatError: not a well-formed safetensors patch file; see the module's own checks.
        PatchVersionError: a version or metadata key that this reader does not know.
        PatchTargetError: a tensor's name is neither `layers.<i>.<site>.a|b|bias|mean` nor `prefix.<i>.key|value`,
            or there is no tensor.
        OSError: the operating system's own error on an existing file, such as missing permission.
    """
    where = Path(path)
    raw, header = _checked_container(where)
    config = _checked_metadata(header.get("__metadata__"), where)
    slots: Slots = {}
    entries: Entries = {}
    for name, values in _decoded(raw, where).items():
        if entry := _ENTRY.fullmatch(name):
            entries[int(entry[1]), entry[2]] = values
        else:
            layer, site, part = _parse_name(name)
            slots.setdefault((layer, site), {})[part] = values
    if not slots and not entries:
        raise PatchTargetError(
            "the patch holds no delta",
            field=str(where),
            got="0 tensors",
            wanted="at least one layers.<i>.<site>.a|b|bias",
            fix="export the patch again",
        )
    return slots, entries, config


def read_tensors(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """Read another tool's safetensors file, such as a LoRA adapter's, with the same suspicion.

    Args:
        path: a regular file, or a symlink to one.

    Returns:
        Name to float32 array of one or two dimensions.

    Raises:
        PatchFormatError: not a well-formed safetensors file, a kind of file that is never opened, or a tensor that is
            not f16, bf16 or f32.
        OSError: the operating system's own error on an existing file, such as missing permission.
    """
    where = Path(path)
    raw, _header = _checked_container(where)
    return _decoded(raw, where)


def _checked_container(where: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the file and its header, once each tensor is known to lie in the file."""
    if where.suffix.lower() in _UNSAFE_SUFFIXES:
        _refuse_unsafe(where, f"a {where.suffix} file")
    raw = _read_once(where)
    _refuse_other_kinds(raw, where)
    return raw, _checked_header(raw, where)


def _decoded(raw: bytes, where: Path) -> dict[str, NDArray[np.float32]]:
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        _malformed(where, "the safetensors library refuses the file", str(error), "a valid safetensors file")
    return {name: _decode(tensor["data"], tensor["dtype"], tensor["shape"]) for name, tensor in tensors}


def _read_once(where: Path) -> bytes:
    """All bytes of a regular file; O_NONBLOCK so that a FIFO is refused instead of waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(where, flags)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        _malformed(where, "no such file", error.strerror, "a .safetensors patch file", "check the path")
    except ValueError as error:  # a NUL in the path
        _malformed(where, "not a path", str(error), "a .safetensors patch file", "check the path")
    try:
        # The opened file is asked, not the path: the two could differ by now.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            _malformed(where, "not a regular file", stat.filemode(status.st_mode), "a file", "check the path")
        if status.st_size > MAX_FILE_BYTES:
            _malformed(where, "the file is too large for a patch", status.st_size, f"<= {MAX_FILE_BYTES} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as handle:
            return handle.read(status.st_size)
    finally:
        os.close(descriptor)


def _refuse_other_kinds(raw: bytes, where: Path) -> None:
    # A header of 384 bytes starts like a pickle (0x80 0x01): a plausible length with "{" after it is a
    # safetensors file, and goes on to be checked as one.
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= MAX_HEADER_BYTES:
        return
    for magic, kind in _UNSAFE_MAGIC.items():
        if raw.startswith(magic):
            _refuse_unsafe(where, f"{kind} content")


def _checked_header(raw: bytes, where: Path) -> dict[str, Any]:
    """The header, its tensors proven to be well described and to tile the rest of the file exactly."""
    if len(raw) < 8:
        _malformed(where, "the file is truncated", f"{len(raw)} bytes", ">= 8 bytes")
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES:
        _malformed(where, "header length over the cap", length, f"<= {MAX_HEADER_BYTES} bytes")
    if length > len(raw) - 8:
        _malformed(where, "header length over the file", length, f"<= {len(raw) - 8} bytes")
    header = _json_object(raw[8 : 8 + length], where, "header")
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            spans.append((*_checked_entry(name, entry, where), name))
    position, size = 0, len(raw) - 8 - length
    for begin, end, name in sorted(spans):
        if begin < position:
            _malformed(where, f"tensor {name!r} overlaps another", f"begin {begin}", f"begin {position}")
        if begin > position:
            _malformed(where, f"a hole before tensor {name!r}", f"begin {begin}", f"begin {position}")
        position = end
    if position > size:
        _malformed(where, "the file is truncated", f"{size} bytes of tensors", f"{position} bytes")
    if position < size:
        _malformed(where, "trailing bytes after the tensors", f"{size} bytes", f"{position} bytes")
    return header


def _checked_entry(name: str, entry: Any, where: Path) -> tuple[int, int]:
    """Check one tensor's description; return its byte range."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _malformed(where, f"tensor {name!r} is badly described", entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _malformed(
            where,
            f"tensor {name!r} has an unsupported dtype",
            repr(dtype),
            " | ".join(_ITEM_BYTES),
            "convert the tensors to one of these",
        )
    if not _whole_numbers(shape) or len(shape) > 3 or any(d < 0 for d in shape):
        _malformed(where, f"tensor {name!r} has a bad shape", shape, "one to three dimensions, none negative")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        _malformed(where, f"tensor {name!r} has bad offsets", offsets, "[begin, end] with 0 <= begin <= end")
    size = _ITEM_BYTES[dtype]
    for dimension in shape:
        if dimension > MAX_FILE_BYTES:
            _malformed(where, f"tensor {name!r}: size overflow", shape, f"dimensions <= {MAX_FILE_BYTES}")
        size *= dimension
    if size > MAX_FILE_BYTES:
        _malformed(where, f"tensor {name!r}: size overflow", f"{size} bytes", f"<= {MAX_FILE_BYTES} bytes")
    if size != offsets[1] - offsets[0]:
        _malformed(where, f"tensor {name!r} does not fill its range", f"{offsets[1] - offsets[0]} bytes", size)
    return offsets[0], offsets[1]


def _checked_metadata(metadata: Any, where: Path) -> dict[str, Any]:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = metadata.get("format") if isinstance(metadata, dict) else metadata
        _malformed(
            where,
            "a safetensors file, but not a patch",
            f"format {got!r}",
            f"format {FORMAT!r}",
            "make a patch with tp-export",
        )
    if metadata.get("version") not in VERSIONS:
        raise PatchVersionError(
            "unknown version of the patch file",
            field=str(where),
            got=repr(metadata.get("version")),
            wanted=" | ".join(map(repr, VERSIONS)),
            fix="update tp-runtime",
        )
    unknown = sorted(set(metadata) - set(METADATA_KEYS))
    if unknown:
        raise PatchVersionError(
            "unknown metadata key",
            field=str(where),
            got=", ".join(map(repr, unknown[:5])),
            wanted=", ".join(METADATA_KEYS),
            fix="update tp-runtime: a newer version may have written this patch",
        )
    if not isinstance(metadata.get("config"), str):
        _malformed(where, "the patch has no config", repr(metadata.get("config")), "a JSON text")
    return _json_object(metadata["config"].encode("utf-8", "surrogatepass"), where, "config")


def _json_object(raw: bytes, where: Path, what: str) -> dict[str, Any]:
    """The JSON object that is the header or the config of the file."""
    try:
        return parse_json_object(raw)
    except StrictJSONError as error:
        _malformed(where, f"the {what} {error.problem}", error.got, error.wanted)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)  # True is no dimension


def _parse_name(name: str) -> tuple[int, str, str]:
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in SITES:
        raise PatchTargetError(
            "a tensor addresses no slot that exists",
            field=ascii(name),
            got="an unknown name" if match is None else f"site {match[2]!r}",
            wanted=f"layers.<i>.<site>.a|b|bias|mean with site {' | '.join(SITES)}, or prefix.<i>.key|value",
            fix="export the patch with tp-export, or rename the tensor",
        )
    return int(match[1]), match[2], match[3]


def _malformed(where: Path, problem: str, got: object, wanted: object, fix: str = _COPY_AGAIN) -> NoReturn:
    text = str(got)
    got = text if len(text) <= 200 else text[:200] + "..."  # a header can be 16 MiB; a message must not be
    raise PatchFormatError(problem, field=ascii(str(where))[1:-1], got=got, wanted=wanted, fix=fix)


def _refuse_unsafe(where: Path, got: str) -> NoReturn:
    _malformed(
        where,
        "unsafe format: it can run code when opened, or hides what it holds, so it was not opened",
        got,
        "a .safetensors patch file",
        "export the patch with tp-export, or convert the tensors to .safetensors where you trust them",
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
        # Round to nearest, ties to even: add just under half a step, and the last kept bit.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        fits = bool(np.all((rounded & 0x7F80) != 0x7F80))
        raw = rounded.astype("<u2").tobytes()
    else:
        with np.errstate(over="ignore"):  # reported below, by name
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
    """Write a patch file whole or not at all; equal contents give equal bytes.

    The container is written here and not by safetensors.serialize, whose signature differs between the
    versions we support (the newest wants raw pointers).

    Args:
        path: ends in .safetensors; a file there is replaced.
        tensors: float32 arrays by the names of `slot_name` and `entry_name`.
        config: the JSON object of the metadata.
        dtype: "f16", "bf16" or "f32", for every tensor.

    Raises:
        PatchFormatError: an unknown dtype, another suffix, or more bytes than a reader accepts.
        PatchValueError: a value that does not fit the dtype.
        OSError: the operating system's error; no file is left behind.
    """
    where = Path(path)
    if where.suffix != ".safetensors":
        fix = f"save as {where.name}.safetensors"
        _malformed(where, "not a patch file's name", repr(where.suffix), "suffix .safetensors", fix)
    if dtype not in DTYPES:
        _malformed(where, "unknown dtype", repr(dtype), " | ".join(DTYPES), "choose one of these")
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
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes, as other writers have it
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + position > MAX_FILE_BYTES:
        size = f"{len(text)} bytes of header, {position} of tensors"
        wanted = f"<= {MAX_HEADER_BYTES} of header, <= {MAX_FILE_BYTES} in all"
        _malformed(where, "the patch is too large", size, wanted, "truncate it to a lower rank")
    with atomic_file(where) as temporary, temporary.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.writelines(blobs)

"""The patch file: which tensors and which metadata of a safetensors container make a patch.

This module handles the metadata and the names of tensors (versions.py says what each version holds). It does not handle
the bytes of the container (container.py), how values become whole numbers with scales (encoding.py), the meaning of a
patch, the sum of patches, or the contents of the config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PatchTargetError, PatchVersionError, shown
from .container import (
    StoredTensors,
    checked_header,
    container_bytes,
    file_tensors,
    json_object,
    malformed,
    read_file,
    write_container,
)
from .dtypes import ITEM_BYTES
from .encoding import Tensors, decoded, dtype_of, encoded
from .kind import FORMAT, PATCH_FILE
from .names import EntryKey, SlotKey, parse_entry_name, parse_slot_name
from .tensors import Tensor
from .versions import VERSIONS, check_version, versioned

DeltaTensors = dict[SlotKey, dict[str, Tensor]]
"""The tensors of each slot's delta, by part ("a" | "b" | "bias" | "mean")."""
EntryTensors = dict[EntryKey, Tensor]
"""The tensors of the KV prefix."""

METADATA_KEYS = ("format", "version", "config")


# -- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchFile:
    """What a patch file holds. The shapes, the values and the config's keys are not yet checked against each other.

    Attributes:
        config: the parsed config object.
        dtype: the dtype of such a file, a key of `DTYPES`.
        nbytes: the number of bytes of the file.
        tensors: the tensors by name, quantised ones together with their scales; they share the memory of the file.
    """

    config: dict[str, Any]
    dtype: str
    nbytes: int
    tensors: Tensors


def read_patch(path: str | os.PathLike[str]) -> PatchFile:
    """Read a patch file of any of the `VERSIONS`.

    Args:
        path: a regular file, or a symlink to one.

    Raises:
        PatchFormatError: the file is not a well-formed safetensors patch file, its version does not fit what it holds,
            or a quantised tensor is not one that may be quantised, or its scales are missing or without it.
        PatchVersionError: the file has a version or a metadata key that this version of tp-runtime does not know.
        PatchTargetError: there is no tensor.
        PatchShapeError: the shape of scales does not fit their tensor.
        PatchValueError: a scale is NaN, infinite, zero or negative, or an int8 value is -128.
        OSError: the operating system refuses to read an existing file, for example because of its permissions.
    """
    file = Path(path)
    return parse_patch(read_file(file), file)


def parse_patch(raw: bytes, file: Path) -> PatchFile:
    """Parse the bytes of a patch file.

    Args:
        raw: the bytes.
        file: where they are from, for errors.

    Raises:
        PatchFormatError, PatchVersionError, PatchTargetError, PatchShapeError, PatchValueError: as for `read_patch`.
    """
    metadata, ranges = checked_header(raw, file, tuple(ITEM_BYTES))
    version, config = _checked_metadata(metadata, file)
    stored = file_tensors(raw, ranges)
    check_version(str(file), version, config, stored)
    tensors = decoded(stored)
    if not tensors:
        raise PatchTargetError(
            "the patch holds no delta",
            field=str(file),
            got="0 tensors",
            wanted="at least one layers.<i>.<site>.a|b|bias",
            fix="export the patch again",
        )
    return PatchFile(config, dtype_of(stored), len(raw), tensors)


def split_tensors(tensors: Tensors) -> tuple[DeltaTensors, EntryTensors]:
    """Return the tensors of the slots [in, rank] | [rank, out] | [out] | [in], and those of the KV prefix, by address.

    Raises:
        PatchTargetError: a tensor's name is none that docs/patch-file.md lists.
    """
    deltas: DeltaTensors = {}
    entries: EntryTensors = {}
    for name, values in tensors.items():
        if entry := parse_entry_name(name):
            entries[entry] = values
        else:
            slot, part = parse_slot_name(name)
            deltas.setdefault(slot, {})[part] = values
    return deltas, entries


def _checked_metadata(metadata: Any, file: Path) -> tuple[str, dict[str, Any]]:
    """Return the version and the parsed config object."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = metadata.get("format") if isinstance(metadata, dict) else metadata
        malformed(
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
        malformed(file, "the patch has no config", shown(metadata.get("config")), "a JSON text")
    return metadata["version"], json_object(metadata["config"], file, "config")


# -- writing -------------------------------------------------------------------------------------------------


def write_patch(path: str | os.PathLike[str], tensors: Tensors, config: Mapping[str, Any], dtype: str) -> None:
    """Write a patch file, whole or not at all. Equal contents give equal bytes.

    Args:
        path: the file to write, which ends in .safetensors. An existing file is replaced if it is a patch file.
        tensors: the tensors.
        config: the JSON object for the metadata; `versioned` adds what its version requires.
        dtype: the dtype of the tensors, a key of `DTYPES`.

    Raises:
        PatchFormatError: `dtype` is unknown, `path` has another suffix, or the file would have more bytes than the
            reader accepts.
        PatchValueError: a value does not fit `dtype`.
        PatchShapeError: entries of an odd head dim cannot have four bits.
        OutputError: `path` holds something that is not a patch file.
        OSError: the operating system refuses the write, for example because the disk is full. No file is left behind.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        fix = f"save as {file.name}.safetensors"
        malformed(file, "the file's name does not end in .safetensors", repr(file.suffix), ".safetensors", fix)
    stored = encoded(tensors, dtype)
    write_container(file, _metadata(config, stored), stored, PATCH_FILE)


def patch_bytes(tensors: Tensors, config: Mapping[str, Any], dtype: str) -> int:
    """Return the number of bytes of the file that `write_patch` writes.

    Raises:
        PatchFormatError: `dtype` is unknown.
    """
    stored = encoded(tensors, dtype)
    return container_bytes(_metadata(config, stored), stored)


def _metadata(config: Mapping[str, Any], stored: StoredTensors) -> dict[str, str]:
    version, completed = versioned(config, stored)
    return {"format": FORMAT, "version": version, "config": json.dumps(completed, allow_nan=False)}

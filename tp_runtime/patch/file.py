"""The patch file: which tensors and which metadata of a safetensors container make a patch.

This module handles the metadata, the names of tensors, and int8 tensors with their scales (int8.py has the formulas,
versions.py what each version holds). It does not handle the bytes of the container (container.py), the meaning of a
patch, the sum of patches, or the contents of the config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchFormatError, PatchShapeError, PatchTargetError, PatchValueError, PatchVersionError, shown
from .container import (
    FileTensors,
    StoredTensor,
    StoredTensors,
    checked_header,
    container_bytes,
    file_tensors,
    json_object,
    malformed,
    read_file,
    write_container,
)
from .dtypes import DTYPES, ITEM_BYTES
from .int8 import AXES, LARGEST, quantise, scale_shape, scales_fit_half
from .kind import FORMAT, PATCH_FILE
from .names import EntryKey, SlotKey, parse_entry_name, parse_scale_name, parse_slot_name, part_of, scale_name
from .tensors import FileTensor, Tensor
from .versions import VERSIONS, check_version, versioned

DeltaTensors = dict[SlotKey, dict[str, Tensor]]
"""The tensors of each slot's delta, by part ("a" | "b" | "bias" | "mean")."""
EntryTensors = dict[EntryKey, Tensor]
"""The tensors of the KV prefix."""
Tensors = Mapping[str, Tensor]
"""The tensors of a patch, by the names that `slot_name` and `entry_name` give."""

METADATA_KEYS = ("format", "version", "config")

_AGAIN = "export the patch again with this version of tp-export"


# -- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchFile:
    """What a patch file holds. The shapes, the values and the config's keys are not yet checked against each other.

    Attributes:
        config: the parsed config object.
        dtype: the dtype in which saving the patch again changes no value, a key of `DTYPES`.
        nbytes: the number of bytes of the file.
        tensors: the tensors by name, int8 ones together with their scales; they share the memory of the file's bytes.
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
            or an int8 tensor is not one that may be int8, or its scales are missing or without it.
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
    tensors = _with_scales(stored)
    if not tensors:
        raise PatchTargetError(
            "the patch holds no delta",
            field=str(file),
            got="0 tensors",
            wanted="at least one layers.<i>.<site>.a|b|bias",
            fix="export the patch again",
        )
    return PatchFile(config, _dtype_of(stored), len(raw), tensors)


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


# -- tensors as they are stored ------------------------------------------------------------------------------


def rounded_tensors(tensors: Tensors, dtype: str) -> dict[str, FileTensor]:
    """Return the tensors as a file of this dtype holds them; rounding them again changes nothing.

    Raises:
        PatchFormatError: the dtype is unknown.
        PatchValueError: a value does not fit the dtype.
    """
    stored = _encoded(tensors, dtype)
    return _with_scales({name: tensor.rounded(name) for name, tensor in stored.items()})


def _encoded(tensors: Tensors, dtype: str) -> StoredTensors:
    """Return the tensors of a file of this dtype, the scales of int8 tensors among them."""
    check_dtype(dtype)
    if dtype != "i8":
        return {name: StoredTensor(DTYPES[dtype], tensor.float32()) for name, tensor in tensors.items()}
    stored: StoredTensors = {}
    for name, tensor in tensors.items():
        values = tensor.float32()
        if (part := part_of(name)) not in AXES:  # a bias or a mean
            stored[name] = StoredTensor(DTYPES["f16"], values)
            continue
        q, scales = quantise(part, values)
        stored[name] = StoredTensor("I8", q)
        stored[scale_name(name)] = StoredTensor("F16" if scales_fit_half(scales) else "F32", scales)
    return stored


def _with_scales(stored: FileTensors) -> dict[str, FileTensor]:
    """Return the tensors of a file, int8 ones together with their scales, which are checked."""
    tensors = {}
    for name, tensor in stored.items():
        dtype = tensor.dtype
        if (scaled := parse_scale_name(name)) is not None:
            if scaled not in stored or stored[scaled].dtype != "I8":
                found = "no such tensor" if scaled not in stored else stored[scaled].dtype
                raise _misfit(name, "there are scales, but their tensor is not int8", found, f"{scaled!r} as I8")
        elif dtype != "I8":
            tensors[name] = tensor
        elif (part := part_of(name)) not in AXES:
            raise _misfit(name, "this tensor may not be int8", "I8", "F16, BF16 or F32; I8 for a, b, key and value")
        elif (scales := stored.get(scale_name(name))) is None:
            raise _misfit(name, "the int8 tensor has no scales", "no such tensor", repr(scale_name(name)))
        else:
            _check_int8(name, tensor.stored, scales)
            tensors[name] = tensor.scaled_by(scales, part)
    return tensors


def _check_int8(name: str, q: NDArray[np.int8], scales: FileTensor) -> None:
    """Check an int8 tensor and its scales against each other."""
    field = scale_name(name)
    if scales.dtype not in ("F16", "F32"):
        raise _misfit(field, "the scales have a wrong dtype", scales.dtype, "F16 or F32")
    axis = AXES[part_of(name)]
    if q.ndim <= axis or scales.shape != scale_shape(part_of(name), q.shape):
        raise PatchShapeError(
            "the scales do not fit their tensor",
            field=field,
            got=list(scales.shape),
            wanted=f"the shape of {name!r}, {list(q.shape)}, without dimension {axis}",
            fix=_AGAIN,
        )
    values = scales.float32()
    if not (good := np.isfinite(values) & (values > 0)).all():
        raise PatchValueError(
            "a scale is NaN, infinite, zero or negative",
            field=field,
            got=f"{float(values[~good][0])}, {np.count_nonzero(~good)} of {good.size} scales",
            wanted="finite numbers > 0",
            fix=_AGAIN,
        )
    if (q < -LARGEST).any():
        wanted = f"-{LARGEST}..{LARGEST}"
        raise PatchValueError("the int8 values are not symmetric", field=name, got=-128, wanted=wanted, fix=_AGAIN)


def _dtype_of(stored: FileTensors) -> str:
    """Return the dtype in which saving changes no value: float32 for a mixture that none of the others gives."""
    found = {(tensor.dtype, part_of(name) in AXES) for name, tensor in stored.items() if not parse_scale_name(name)}
    if ("I8", True) in found:
        return "i8" if found <= {("I8", True), ("F16", False)} else "f32"
    dtypes = {dtype for dtype, _scaled in found}
    return next((name for name, dtype in DTYPES.items() if dtypes == {dtype}), "f32")


def check_dtype(dtype: object) -> None:
    """Raise PatchFormatError unless the value is a key of `DTYPES`."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PatchFormatError(
            "the dtype is unknown",
            field="dtype",
            got=shown(dtype),
            wanted=" | ".join(DTYPES),
            fix="choose one of these",
        )


def _misfit(name: str, problem: str, got: str, wanted: str) -> PatchFormatError:
    return PatchFormatError(problem, field=name, got=got, wanted=wanted, fix=_AGAIN)


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
        OutputError: `path` holds something that is not a patch file.
        OSError: the operating system refuses the write, for example because the disk is full. No file is left behind.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        fix = f"save as {file.name}.safetensors"
        malformed(file, "the file's name does not end in .safetensors", repr(file.suffix), ".safetensors", fix)
    stored = _encoded(tensors, dtype)
    write_container(file, _metadata(config, stored), stored, PATCH_FILE)


def patch_bytes(tensors: Tensors, config: Mapping[str, Any], dtype: str) -> int:
    """Return the number of bytes of the file that `write_patch` writes.

    Raises:
        PatchFormatError: `dtype` is unknown.
    """
    stored = _encoded(tensors, dtype)
    return container_bytes(_metadata(config, stored), stored)


def _metadata(config: Mapping[str, Any], stored: StoredTensors) -> dict[str, str]:
    version, completed = versioned(config, stored)
    return {"format": FORMAT, "version": version, "config": json.dumps(completed, allow_nan=False)}

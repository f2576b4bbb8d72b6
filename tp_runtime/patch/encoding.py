"""How the tensors of a patch are stored in each dtype: floats, int8 values with scales, four bits with zero points too.

    dtype           keys and values    factors a and b    biases and means
    f16, bf16, f32  the dtype          the dtype          the dtype
    i8              I8                 I8                 F16
    i4              U8                 I8                 F16

A quantised tensor has companions beside it, which have its name with a suffix: `_scale`, and `_zero` with four bits.
int8.py and int4.py have the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchFormatError, PatchShapeError, PatchValueError, shown
from .container import FileTensors, StoredTensor, StoredTensors
from .dtypes import DTYPES, ITEM_BYTES
from .int4 import BLOCK, BLOCK_AXES, LARGEST_VALUE, block_shape, quantise4
from .int8 import AXES, LARGEST, quantise, scale_shape, scales_fit_half
from .names import KV_PARTS, parse_companion_name, part_of, scale_name, zero_name
from .tensors import FileTensor, Int4Tensor, Int8Tensor, Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of a patch, by the names that `slot_name` and `entry_name` give."""

_AGAIN = "export the patch again with this version of tp-export"
_KINDS = {"i8": ("I8", "I8", "F16"), "i4": ("U8", "I8", "F16")}
"""The dtypes in the file of entries, factors and other tensors; the float dtypes have one for all."""


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


def rounded_tensors(tensors: Tensors, dtype: str) -> dict[str, Tensor]:
    """Return the tensors as a file of this dtype holds them; rounding them again changes nothing.

    Raises:
        PatchFormatError: the dtype is unknown.
        PatchShapeError, PatchValueError: a tensor does not fit the dtype.
    """
    stored = encoded(tensors, dtype)
    return decoded({name: tensor.rounded(name) for name, tensor in stored.items()})


def encoded(tensors: Tensors, dtype: str) -> StoredTensors:
    """Return the tensors of a file of this dtype, the companions of quantised tensors among them.

    Raises:
        PatchFormatError: the dtype is unknown.
        PatchShapeError, PatchValueError: entries cannot have four bits.
    """
    check_dtype(dtype)
    stored: StoredTensors = {}
    for name, tensor in tensors.items():
        values, part = tensor.float32(), part_of(name)
        kind = _kind(dtype, part)
        if kind == "U8":
            _check_fits_int4(name, values)
            packed, scales, zeros = quantise4(part, values)
            stored[name], stored[zero_name(name)] = StoredTensor("U8", packed), StoredTensor("I8", zeros)
        elif kind == "I8":
            q, scales = quantise(part, values)
            stored[name] = StoredTensor("I8", q)
        else:
            stored[name] = StoredTensor(kind, values)
            continue
        stored[scale_name(name)] = StoredTensor("F16" if scales_fit_half(scales) else "F32", scales)
    return stored


def _kind(dtype: str, part: str) -> str:
    """Return the dtype in the file of one part of a patch that is stored in `dtype`."""
    entries, factors, others = _KINDS.get(dtype, (DTYPES[dtype],) * 3)
    return entries if part in BLOCK_AXES else factors if part in AXES else others


def entry_nbytes(dtype: str, count: int, heads: int, head_dim: int) -> int:
    """Return the bytes of a layer's keys and values in a file, with scales in half precision.

    Args:
        dtype: the dtype of the file, a key of `DTYPES`.
        count: the number of entries.
        heads: the number of key/value heads.
        head_dim: the number of channels of a head.
    """
    shape = count, heads, head_dim
    numbers = 2 * prod(shape)
    if (kind := _kind(dtype, "key")) == "I8":
        return numbers + 2 * sum(prod(scale_shape(part, shape)) for part in KV_PARTS)
    if kind == "U8":
        return numbers // 2 + 3 * sum(prod(block_shape(part, shape)) for part in KV_PARTS)
    return numbers * ITEM_BYTES[kind]


def entry_tensors(dtype: str) -> int:
    """Return how many tensors of a file hold a layer's keys and values: both, and their companions."""
    companions = {"I8": 1, "U8": 2}.get(_kind(dtype, "key"), 0)
    return len(KV_PARTS) * (1 + companions)


def decoded(stored: FileTensors) -> dict[str, Tensor]:
    """Return the tensors of a file, quantised ones together with their companions, which are checked.

    Raises:
        PatchFormatError: a tensor is quantised that may not be, or lacks a companion, or a companion lacks its tensor.
        PatchShapeError: the shape of a companion does not fit its tensor.
        PatchValueError: a scale is NaN, infinite, zero or negative, or an int8 value is -128.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if (companion := parse_companion_name(name)) is not None:
            _check_companion(name, *companion, stored)
        elif tensor.dtype == "I8":
            tensors[name] = _int8(name, tensor, stored)
        elif tensor.dtype == "U8":
            tensors[name] = _int4(name, tensor, stored)
        else:
            tensors[name] = tensor
    return tensors


def dtype_of(stored: FileTensors) -> str:
    """Return the dtype whose files hold such tensors: float32 for a mixture that is no other dtype's.

    Saving in it changes no value of a file that this module wrote.
    """
    return _dtype_with(
        (part_of(name), tensor.dtype) for name, tensor in stored.items() if not parse_companion_name(name)
    )


def dtype_of_file(names: Iterable[str], dtype: str) -> str:
    """Return what `dtype_of` gives for a file of these tensors that is saved in `dtype`.

    A dtype may have no tensor that only its files hold: a file of weights alone in "i4" is one of "i8".
    """
    return _dtype_with((part, _kind(dtype, part)) for part in map(part_of, names))


def _dtype_with(kinds: Iterable[tuple[str, str]]) -> str:
    """Return the first dtype that stores every part in its dtype of the file; "f32" if there is none."""
    found = set(kinds)
    return next((name for name in DTYPES if all(kind == _kind(name, part) for part, kind in found)), "f32")


def _int8(name: str, q: FileTensor, stored: FileTensors) -> Int8Tensor:
    part = part_of(name)
    if part not in AXES:
        raise _misfit(name, "this tensor may not be int8", "I8", "F16, BF16 or F32; I8 for a, b, key and value")
    scales, axis = _scales(name, stored, "the int8 tensor"), AXES[part]
    fits = len(q.shape) > axis and scales.shape == scale_shape(part, q.shape)
    wanted = f"the shape of {name!r}, {list(q.shape)}, without dimension {axis}"
    _check_shape(fits, "the scales do not fit their tensor", scale_name(name), scales, wanted)
    _check_scales(scale_name(name), scales)
    if (q.stored < -LARGEST).any():
        wanted = f"-{LARGEST}..{LARGEST}"
        raise PatchValueError("the int8 values are not symmetric", field=name, got=-128, wanted=wanted, fix=_AGAIN)
    return Int8Tensor(part, q, scales)


def _int4(name: str, packed: FileTensor, stored: FileTensors) -> Int4Tensor:
    part = part_of(name)
    if part not in BLOCK_AXES:
        raise _misfit(name, "this tensor may not have four bits", "U8", "F16, BF16, F32 or I8; U8 for key and value")
    scales = _scales(name, stored, "the tensor of four bits")
    if (zeros := stored.get(zero_name(name))) is None:
        raise _misfit(name, "the tensor of four bits has no zero points", "no such tensor", repr(zero_name(name)))
    if zeros.dtype != "I8":
        raise _misfit(zero_name(name), "the zero points have a wrong dtype", zeros.dtype, "I8")
    problem, wanted = "the tensor of four bits has a wrong shape", "[entries, heads, half the head dim], none zero"
    _check_shape(len(packed.shape) == 3 and 0 not in packed.shape, problem, name, packed, wanted)
    blocks = block_shape(part, (*packed.shape[:-1], 2 * packed.shape[-1]))
    wanted = f"{list(blocks)}, a number for each block of {BLOCK} of {name!r}"
    for what, field, tensor in (("scales", scale_name(name), scales), ("zero points", zero_name(name), zeros)):
        _check_shape(tensor.shape == blocks, f"the {what} do not fit their tensor", field, tensor, wanted)
    _check_scales(scale_name(name), scales)
    return Int4Tensor(part, packed, scales, zeros)


def _check_companion(name: str, tensor: str, companion: str, stored: FileTensors) -> None:
    """Check that the tensor of a companion is one that has such companions."""
    found = stored[tensor].dtype if tensor in stored else "no such tensor"
    if companion == "scale" and found not in ("I8", "U8"):
        raise _misfit(name, "there are scales, but their tensor is not quantised", found, f"{tensor!r} as I8 or U8")
    if companion == "zero" and found != "U8":
        problem = "there are zero points, but their tensor has not four bits"
        raise _misfit(name, problem, found, f"{tensor!r} as U8")


def _scales(name: str, stored: FileTensors, what: str) -> FileTensor:
    """Return the scales of a quantised tensor, whose dtype is checked."""
    field = scale_name(name)
    if (scales := stored.get(field)) is None:
        raise _misfit(name, f"{what} has no scales", "no such tensor", repr(field))
    if scales.dtype not in ("F16", "F32"):
        raise _misfit(field, "the scales have a wrong dtype", scales.dtype, "F16 or F32")
    return scales


def _check_shape(fits: bool, problem: str, field: str, tensor: FileTensor, wanted: str) -> None:
    if not fits:
        raise PatchShapeError(problem, field=field, got=list(tensor.shape), wanted=wanted, fix=_AGAIN)


def _check_scales(field: str, scales: FileTensor) -> None:
    values = scales.float32()
    if not (good := np.isfinite(values) & (values > 0)).all():
        raise PatchValueError(
            "a scale is NaN, infinite, zero or negative",
            field=field,
            got=f"{float(values[~good][0])}, {np.count_nonzero(~good)} of {good.size} scales",
            wanted="finite numbers > 0",
            fix=_AGAIN,
        )


def _check_fits_int4(name: str, values: NDArray[np.float32]) -> None:
    """Check that entries can be stored in four bits.

    Raises:
        PatchShapeError: the head dim is odd.
        PatchValueError: a value is so large that half precision could not hold its block's scale.
    """
    if values.shape[-1] % 2:
        problem, wanted = "entries of four bits share bytes in pairs", "[entries, heads, an even head dim]"
        raise PatchShapeError(problem, field=name, got=list(values.shape), wanted=wanted, fix="save with dtype='i8'")
    if (largest := float(np.abs(values).max())) > LARGEST_VALUE:
        raise PatchValueError(
            "a value does not fit four bits",
            field=name,
            got=f"magnitude {largest:.6g}",
            wanted=f"magnitude <= {LARGEST_VALUE:.6g}",
            fix="save with dtype='i8'",
        )


def _misfit(name: str, problem: str, got: str, wanted: str) -> PatchFormatError:
    return PatchFormatError(problem, field=name, got=got, wanted=wanted, fix=_AGAIN)

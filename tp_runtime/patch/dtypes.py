"""The dtypes of a patch file: numpy arrays as bytes and back. numpy has no bfloat16, which is half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchValueError
from ..storage import StoredRange

DTYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32", "i8": "I8", "i4": "U8"}
"""The dtypes that a patch can be saved in, with the names of its main tensors' dtype in the file (encoding.py)."""
FLOATS = ("F16", "BF16", "F32")
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "U8": 1}

_WITHOUT_EXTENDED_SIGN = np.uint32(0x8FFFFFFF).view(np.int32)
_BIAS = np.float32(2.0**112)
_LARGEST = {"F16": "65504", "BF16": "3.38953e38", "F32": "3.40282e38"}


def stored_view(raw: bytes, place: StoredRange) -> NDArray[Any]:
    """Return a tensor of a file as it is stored; the array shares the memory of `raw`.

    Its dtype is int8, uint8, float16 or float32. bfloat16 gives the bits, as uint16.
    """
    dtype, shape, begin, end = place
    kind = np.dtype({"I8": "i1", "U8": "u1", "BF16": "<u2", "F16": "<f2", "F32": "<f4"}[dtype])
    values = np.frombuffer(raw, kind, (end - begin) // kind.itemsize, begin) if end > begin else np.empty(0, kind)
    return values.reshape(shape)


def floats(dtype: str, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values of a tensor of one of the `FLOATS`. Those of F32 are not copied, if they are aligned.

    Args:
        dtype: its dtype in the file.
        stored: the values from `stored_view`.
    """
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        values = np.empty(stored.shape, np.float32)
        widen(stored, values)
        return values
    return np.require(stored, np.float32, "A")


def widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Write half-precision values to a float32 array of their shape, exactly. numpy's own cast takes ten times as long.

    The bits of a half are moved to where a float32 has its sign, exponent and fraction. The exponents of the two count
    from different zeros, 112 apart, which a product with 2^112 corrects, for subnormal halves too.
    """
    bits = halves.view(np.int16)
    if ((bits & 0x7C00) == 0x7C00).any():  # infinity and NaN, which a product does not give
        out[...] = halves
        return
    moved = out.view(np.int32)
    moved[...] = bits  # extends the sign over the upper half
    moved <<= 13
    moved &= _WITHOUT_EXTENDED_SIGN
    out *= _BIAS


def encode(values: NDArray[Any], dtype: str, name: str) -> bytes:
    """Return the bytes of a tensor: whole numbers for I8 and U8, float32 values for every other dtype.

    Args:
        values: the array.
        dtype: a key of `ITEM_BYTES`.
        name: the tensor's name, for the error.

    Raises:
        PatchValueError: a value does not fit the dtype.
    """
    if dtype in ("I8", "U8"):
        return values.tobytes()
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Round to nearest, ties to even: add just under half of the last kept bit, and the last kept bit itself.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        fits = bool(np.all((rounded & 0x7F80) != 0x7F80))
        raw = rounded.astype("<u2").tobytes()
    else:
        with np.errstate(over="ignore"):  # the error below reports it with the tensor's name
            stored = values.astype("<f2" if dtype == "F16" else "<f4")
        fits = bool(np.isfinite(stored).all())
        raw = stored.tobytes()
    if not fits:
        raise PatchValueError(
            f"a value does not fit {dtype.lower()}",
            field=name,
            got=f"magnitude {np.abs(values).max():.6g}",
            wanted=f"magnitude <= {_LARGEST[dtype]}",
            fix="save with dtype='bf16' or 'f32'" if dtype == "F16" else "save with dtype='f32'",
        )
    return raw

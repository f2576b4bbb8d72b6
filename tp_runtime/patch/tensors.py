"""The tensors of a patch in memory: as their file stores them, and float32 only while somebody reads their values.

Of many loaded patches few run at a time. So a tensor keeps the bytes that were read from its file, half precision or
int8 with its scales, and makes float32 values of them whenever they are asked for. A scaled tensor and a sum hold no
values at all: they hold the tensors that they are made of.

Nobody can change a tensor. The identity of a patch is computed once, so its values must stay what they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .arrays import unchangeable
from .dtypes import floats, widen
from .int8 import dequantise

Array = NDArray[np.float32]
Key = TypeVar("Key")


class Tensor(ABC):
    """A tensor of a patch.

    Attributes:
        shape: the dimensions.
    """

    __slots__ = ("shape",)
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape))

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The number of bytes that the tensor, or what it is made of, takes in memory."""

    @abstractmethod
    def float32(self) -> Array:
        """Return the values as a read-only array. A product or a sum beyond float32 is infinite."""

    def native(self) -> NDArray[Any]:
        """Return the values as float16 or float32, whichever the tensor holds."""
        return self.float32()

    def write(self, out: NDArray[Any]) -> None:
        """Write the values to an array of the tensor's shape, float16 or float32. In float16 they may be infinite."""
        with np.errstate(over="ignore"):
            out[...] = self.native()


class FileTensor(Tensor):
    """A tensor as a file stores it.

    Args:
        dtype: the dtype in the file, a key of `ITEM_BYTES`.
        values: the values, in the numpy dtype of `dtypes.stored_view`, in memory that nobody can change.
        scales: the scales of an int8 tensor; None for every other one.
        part: the part that an int8 tensor is, a key of `int8.AXES`.
    """

    __slots__ = ("_part", "_scales", "_values", "dtype")

    def __init__(self, dtype: str, values: NDArray[Any], scales: FileTensor | None = None, part: str = "") -> None:
        self.shape, self.dtype = values.shape, dtype
        self._values, self._scales, self._part = values, scales, part

    def scaled_by(self, scales: FileTensor, part: str) -> FileTensor:
        """Return an int8 tensor together with its scales."""
        return FileTensor(self.dtype, self._values, scales, part)

    @property
    def stored(self) -> NDArray[Any]:
        """The values in the numpy dtype of `dtypes.stored_view`: int8 values without their scales, bfloat16 as bits."""
        return self._values

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file, the scales included."""
        return int(self._values.nbytes) + (0 if self._scales is None else self._scales.nbytes)

    def float32(self) -> Array:
        """Return the values as a read-only array; float32 ones are not copied, if they are aligned."""
        if self._scales is not None:
            array = dequantise(self._part, self._values, self._scales.float32())
        else:
            array = floats(self.dtype, self._values)
        if array is not self._values:
            array.flags.writeable = False
        return array

    def native(self) -> NDArray[Any]:
        """Return the values as float16 or float32, whichever the tensor holds."""
        return self._values if self.dtype == "F16" else self.float32()

    def write(self, out: NDArray[Any]) -> None:
        """Write the values to an array of the tensor's shape, float16 or float32."""
        if self.dtype == "F16" and out.dtype == np.float32:
            widen(self._values, out)
        elif self._scales is not None and out.dtype == np.float32:
            dequantise(self._part, self._values, self._scales.float32(), out)
        else:
            super().write(out)


class ScaledTensor(Tensor):
    """A tensor times a number. Each value is rounded once."""

    __slots__ = ("_strength", "_tensor")

    def __init__(self, tensor: Tensor, strength: float) -> None:
        self.shape = tensor.shape
        self._tensor, self._strength = tensor, strength

    @property
    def nbytes(self) -> int:
        """The number of bytes of the tensor that is scaled."""
        return self._tensor.nbytes

    def float32(self) -> Array:
        """Return the products."""
        with np.errstate(over="ignore", under="ignore"):
            return _read_only((self._tensor.float32() * np.float64(self._strength)).astype(np.float32))


class JoinedTensor(Tensor):
    """Tensors one behind the other along an axis, in which alone they differ."""

    __slots__ = ("_axis", "_tensors")

    def __init__(self, tensors: Sequence[Tensor], axis: int) -> None:
        shape = list(tensors[0].shape)
        shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
        self.shape = tuple(shape)
        self._tensors, self._axis = tuple(tensors), axis

    @property
    def nbytes(self) -> int:
        """The number of bytes of all the tensors."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def float32(self) -> Array:
        """Return the values of all the tensors in one array."""
        return _read_only(np.concatenate([tensor.float32() for tensor in self._tensors], axis=self._axis))


class SummedTensor(Tensor):
    """The sum of two tensors of one shape."""

    __slots__ = ("_tensors",)

    def __init__(self, one: Tensor, two: Tensor) -> None:
        self.shape = one.shape
        self._tensors = one, two

    @property
    def nbytes(self) -> int:
        """The number of bytes of both tensors."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def float32(self) -> Array:
        """Return the sums."""
        one, two = self._tensors
        with np.errstate(over="ignore"):
            return _read_only(one.float32() + two.float32())


def tensor_of(values: NDArray[Any] | Tensor) -> Tensor:
    """Return an array's values as a float32 tensor that later changes of the array do not reach; a tensor as it is."""
    return values if isinstance(values, Tensor) else FileTensor("F32", unchangeable(values))


class Float32Values(Mapping[Key, Array], Generic[Key]):
    """Tensors by key, read as float32 arrays, each of which is made when it is asked for.

    Attributes:
        tensors: the tensors by key.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Mapping[Key, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, key: Key) -> Array:
        return self.tensors[key].float32()

    def __iter__(self) -> Iterator[Key]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array

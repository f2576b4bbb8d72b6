"""The tensors of a patch in memory: as their file stores them, and float32 only while somebody reads their values.

Of many loaded patches few run at a time. So a tensor keeps the bytes that were read from its file, half precision, or
int8 or four bits with their scales, and makes float32 values of them whenever they are asked for. A scaled tensor and a
sum hold no values at all: they hold the tensors that they are made of.

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
from .int4 import FourBits, dequantise4
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
        dtype: the dtype in the file, a key of `ITEM_BYTES`. I8 and U8 are numbers without their scales, of which
            `Int8Tensor` and `Int4Tensor` make values.
        values: the values, in the numpy dtype of `dtypes.stored_view`, in memory that nobody can change.
    """

    __slots__ = ("_values", "dtype")

    def __init__(self, dtype: str, values: NDArray[Any]) -> None:
        self.shape, self.dtype = values.shape, dtype
        self._values = values

    @property
    def stored(self) -> NDArray[Any]:
        """The values in the numpy dtype of `dtypes.stored_view`: bfloat16 as bits."""
        return self._values

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""
        return int(self._values.nbytes)

    def float32(self) -> Array:
        """Return the values as a read-only array; float32 ones are not copied, if they are aligned."""
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
        else:
            super().write(out)


class QuantisedTensor(Tensor):
    """A tensor that a file stores as whole numbers with companions beside it, such as scales.

    Args:
        shape: the dimensions of the values.
        part: which part of a patch it is, such as "key".
        stored: the whole numbers.
        companions: the tensors beside it.
    """

    __slots__ = ("_companions", "_part", "_stored")

    def __init__(self, shape: tuple[int, ...], part: str, stored: FileTensor, *companions: FileTensor) -> None:
        self.shape = shape
        self._part, self._stored, self._companions = part, stored, companions

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file, the companions included."""
        return self._stored.nbytes + sum(companion.nbytes for companion in self._companions)

    @abstractmethod
    def _dequantised(self, out: Array | None) -> Array:
        """Return the values, in `out` if it is given."""

    def float32(self) -> Array:
        """Return the values as a read-only array."""
        return _read_only(self._dequantised(None))

    def write(self, out: NDArray[Any]) -> None:
        """Write the values to an array of the tensor's shape, float16 or float32."""
        if out.dtype == np.float32:
            self._dequantised(out)
        else:
            super().write(out)


class Int8Tensor(QuantisedTensor):
    """A tensor of int8 values with its scales (int8.py)."""

    __slots__ = ()

    def __init__(self, part: str, q: FileTensor, scales: FileTensor) -> None:
        super().__init__(q.shape, part, q, scales)

    def _dequantised(self, out: Array | None) -> Array:
        (scales,) = self._companions
        return dequantise(self._part, self._stored.stored, scales.float32(), out)


class Int4Tensor(QuantisedTensor):
    """Entries of four bits with the scales and the zero points of their blocks (int4.py)."""

    __slots__ = ()

    def __init__(self, part: str, packed: FileTensor, scales: FileTensor, zeros: FileTensor) -> None:
        super().__init__((*packed.shape[:-1], 2 * packed.shape[-1]), part, packed, scales, zeros)

    def _dequantised(self, out: Array | None) -> Array:
        scales, zeros = self._companions
        return dequantise4(self._part, FourBits(self._stored.stored, scales.float32(), zeros.stored), out)


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

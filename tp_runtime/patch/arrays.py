"""Arrays that nobody can change: the identity of a patch is computed once, so its values must stay what they were."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unchangeable(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values as a contiguous float32 array that cannot be made writeable; one that is such is not copied.

    A read-only flag is not enough, because whoever owns the memory can take it away. The memory of a bytes object can
    never be written.
    """
    if in_bytes(values) and values.dtype == np.float32 and values.flags.c_contiguous:
        return values
    with np.errstate(over="ignore"):  # the caller's check of the values reports infinity
        array = np.asarray(values, np.float32, order="C")
    if array.size == 0:  # numpy makes no array over an empty bytes object, and there is no value to protect
        return array
    return np.frombuffer(array.tobytes(), np.float32).reshape(array.shape)


def in_bytes(values: NDArray[Any]) -> bool:
    """Return whether an array's memory is that of a bytes object, such as a file that was read."""
    memory: Any = values
    while isinstance(memory, np.ndarray):
        memory = memory.base
    return isinstance(memory, bytes)

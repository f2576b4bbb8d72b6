"""The tensors that patches bind to a graph's slots, converted and on the device: those of the last patches that ran.

A loaded patch keeps its tensors as its file stores them (patch/tensors.py). Slots take the graph's dtype, on the
graph's device, so a patch is converted before it runs. That takes a few milliseconds, and in float32 twice the memory
of a file in half precision. So the converted tensors of the patches that ran last are kept, up to a number of bytes.

A KV cache refers to the values that are bound to it for as long as it exists. Such values may have to leave the store,
but they stay where they are, and another cache under the same patch gets them without a conversion.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from .kv_cache import CacheKey


class BoundValues(dict[str, Any]):
    """The OrtValues of one patch by graph input name. Whoever binds them refers to this object while they are bound.

    Attributes:
        nbytes: the number of bytes of their own; values that share the memory of a patch file have none.
    """

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, values: dict[str, Any], nbytes: int) -> None:
        super().__init__(values)
        self.nbytes = nbytes


class BoundValuesStore:
    """The values of the patches that ran last. Any number of threads may use it.

    Args:
        limit: the largest number of bytes to keep; with 0 nothing is kept that no cache uses.

    Attributes:
        hits: how often values that were asked for were there.
        misses: how often they had to be converted.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = self.misses = 0
        self._kept: OrderedDict[CacheKey, BoundValues] = OrderedDict()
        self._alive: WeakValueDictionary[CacheKey, BoundValues] = WeakValueDictionary()
        # It is reentrant because the garbage collector may end a dropped request at any line, including one that holds
        # the lock.
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """The number of bytes that are kept."""
        with self._lock:
            return sum(values.nbytes for values in list(self._kept.values()))

    def get(self, key: CacheKey, convert: Callable[[], BoundValues]) -> BoundValues:
        """Return the values of a patch, which are converted if they are not there.

        Args:
            key: the key of caches under the patch, which states the values.
            convert: makes the values. Other threads are not kept waiting meanwhile.
        """
        with self._lock:
            found = self._alive.get(key)
            if found is not None:
                self.hits += 1
                self._keep(key, found)
                return found
            self.misses += 1
        made = convert()
        with self._lock:
            found = self._alive.setdefault(key, made)  # another thread may have been faster
            self._keep(key, found)
        return found

    def drop(self, key: CacheKey) -> None:
        """Stop keeping the values of a patch; they are gone when no cache uses them."""
        with self._lock:
            self._kept.pop(key, None)

    def _keep(self, key: CacheKey, values: BoundValues) -> None:
        self._kept[key] = values
        self._kept.move_to_end(key)
        while self.nbytes > self.limit:  # counted anew, so that an interrupt at any line leaves no wrong number
            self._kept.popitem(last=False)

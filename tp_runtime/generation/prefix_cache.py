"""Keys and values of prompts that were run before, so that what prompts share is run once.

An entry belongs to one cache key (graph, patches and strengths, contract 3 of cache.py) and to the ids it was made
from; a prompt takes from it what the two have in common from the start. Entries are copies that nobody writes to: a
request copies what it takes into buffers of its own. Knows nothing of graphs or devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..session import CacheKey, KVCache

Content = Mapping[str, NDArray[Any]]  # graph input name -> [heads, filled, head dim]


@dataclass(frozen=True, eq=False)
class _Entry:
    key: CacheKey
    tokens: NDArray[np.int64]
    content: Content

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.content.values())

    def common(self, key: CacheKey, tokens: NDArray[np.int64]) -> int:
        """How many ids from the start on are the same; none under another key."""
        if key != self.key:
            return 0
        length = min(len(tokens), len(self.tokens))
        differ = self.tokens[:length] != tokens[:length]
        return int(differ.argmax()) if differ.any() else length


class PrefixCache:
    """Entries up to a number of bytes; the least recently used go first. For any number of threads.

    Args:
        budget: bytes, at least 1, of keys and values; ids and names are not counted.

    Attributes:
        budget: the same.
        hits: requests that found something.
        misses: requests that did not.

    Raises:
        RequestError: `budget` is no number of bytes.
    """

    def __init__(self, budget: int) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise RequestError(
                "not a number of bytes", field="prefix_cache_bytes", got=repr(budget), wanted="a whole number >= 1"
            )
        self.budget = budget
        self.hits = self.misses = 0
        self._entries: tuple[_Entry, ...] = ()  # the least recently used first; replaced, never changed
        # Reentrant: a completion that was dropped is put away by the garbage collector, in whichever line that runs.
        self._lock = threading.RLock()

    @property
    def entries(self) -> int:
        """How many prompts it holds."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values in it, at most the budget."""
        return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        """Forget everything; the counts of hits and misses stay."""
        with self._lock:
            self._entries = ()

    def fill(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Let a cache that nothing was run in begin with what is known of `tokens`, all but the last of them.

        Args:
            cache: fresh; it begins with what its patch's prefix stands in for, if there is one.
            tokens: a prompt that follows that prefix.
        """
        wanted = np.array(tokens[:-1], np.int64)
        with self._lock:
            common, best = max(
                ((entry.common(cache.key, wanted), place) for place, entry in enumerate(self._entries)), default=(0, -1)
            )
            if common <= len(cache):
                self.misses += 1
                return
            self.hits += 1
            entry = self._entries[best]
            self._touch(entry)
        cache.tokens[:] = tokens[:common]
        cache.start = {name: array[:, : cache.filled] for name, array in entry.content.items()}

    def keep(self, cache: KVCache, content: Callable[[], Content]) -> bool:
        """Keep what a cache holds, in the place of entries that it extends.

        Args:
            cache: whose key and tokens it goes by.
            content: gives its keys and values, as many positions as are filled; they are copied.

        Returns:
            Whether it is in the store now; what is larger than the whole budget is not kept.
        """
        tokens = np.array(cache.tokens, np.int64)
        with self._lock:
            for entry in self._entries:
                if len(entry.tokens) >= len(tokens) and entry.common(cache.key, tokens) == len(tokens):
                    self._touch(entry)
                    return True
        found = content()
        if sum(array.nbytes for array in found.values()) > self.budget:
            return False
        new = _Entry(cache.key, tokens, {name: _frozen(array) for name, array in found.items()})
        with self._lock:
            kept = [entry for entry in self._entries if entry.common(new.key, tokens) < len(entry.tokens)]
            room = self.budget - new.nbytes - sum(entry.nbytes for entry in kept)
            while room < 0:
                room += kept.pop(0).nbytes
            self._entries = (*kept, new)
        return True

    def _touch(self, entry: _Entry) -> None:
        self._entries = (*(other for other in self._entries if other is not entry), entry)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    copy = np.array(array, order="C")
    copy.setflags(write=False)
    return copy

"""The prefix cache stores the keys and values of earlier prompts, so that a beginning that prompts share is run once.

Each of its entries belongs to one cache key (the graph, the patches and their strengths, see kv_cache.py) and to the
ids it was made from. If a prompt starts with the same ids as an entry, the request copies the keys and values of these
ids into buffers of its own. An entry is never written to. This module does not handle graphs or devices.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError, library_text, require_positive
from ..session import KVCache, ModelFolder
from .prefix_cache_file import read_prefix_cache, write_prefix_cache
from .prefix_entry import Content, PrefixEntry

log = logging.getLogger("tp_runtime")


class PrefixCache:
    """Entries up to a total number of bytes; the least recently used are dropped first. Threads may share a cache.

    Args:
        budget: the largest number of bytes of keys and values, at least 1; ids and names are not counted.

    Attributes:
        budget: the largest number of bytes of keys and values.
        hits: the number of requests that found a part of their prompt.
        misses: the number of requests that found nothing.

    Raises:
        RequestError: `budget` is not a positive integer.
    """

    def __init__(self, budget: int) -> None:
        require_positive("prefix_cache_bytes", budget)
        self.budget = budget
        self.hits = self.misses = 0
        self._entries: tuple[
            PrefixEntry, ...
        ] = ()  # the least recently used first; the tuple is replaced, never changed
        # The lock is reentrant because the garbage collector may run at any line, end a dropped completion there and
        # store its keys and values.
        self._lock = threading.RLock()

    @property
    def entries(self) -> int:
        """The number of entries."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """The number of bytes of all stored keys and values, at most the budget."""
        return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        """Drop all entries; the counts of hits and misses stay."""
        with self._lock:
            self._entries = ()

    def fill(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Start a fresh cache with the longest stored beginning of `tokens`, which never includes the last of them.

        Args:
            cache: a cache in which nothing was run; it already holds the ids that its patch's KV prefix stands in for,
                if there is one.
            tokens: a prompt that can follow that prefix.
        """
        wanted = np.array(tokens[:-1], np.int64)
        with self._lock:
            entries = self._entries  # places in this tuple stay valid, whatever the garbage collector stores meanwhile
            common, best = max(
                (
                    (common, place)
                    for place, entry in enumerate(entries)
                    if (common := entry.common(cache.key, wanted)) and entry.reaches(cache, common)
                ),
                default=(0, -1),
            )
            if common <= len(cache):
                self.misses += 1
                return
            entry = entries[best]
            if not entry.fits(cache):  # only a file can hold such an entry
                log.warning("an entry of the prefix cache does not fit its patch and was dropped: load another file")
                self._change(lambda held: tuple(other for other in held if other is not entry))
                self.misses += 1
                return
            self.hits += 1
            self._touch(entry)
        # Layers of different kinds may hold different numbers of positions, and each drops those of the other ids.
        dropped = len(entry.tokens) - common
        start = {name: array[:, : array.shape[1] - dropped] for name, array in entry.content.items()}
        cache.begin_with(start, entry.dropped(cache), tokens[:common])

    def offer(self, cache: KVCache, content: Callable[[], Content]) -> None:
        """Store what a cache holds if that succeeds; see `keep`.

        A failure, such as a lack of memory, is logged: the completion is complete without the entry.
        """
        try:
            self.keep(cache, content)
        except Exception as error:
            log.warning("the prefix cache could not store %d tokens: %s", len(cache), library_text(error))

    def keep(self, cache: KVCache, content: Callable[[], Content]) -> bool:
        """Store what a cache holds; the new entry replaces the entries all of whose contents it holds too.

        Args:
            cache: the cache, whose key and tokens the entry gets.
            content: a function that returns the cache's keys and values at the filled positions; they are copied.

        Returns:
            Whether the tokens are stored now. A cache that is larger than the whole budget is not stored, nor one that
            lacks what the window shows the next id.
        """
        if not cache.reaches:
            return False
        tokens = np.array(cache.tokens, np.int64)
        with self._lock:
            for entry in self._entries:
                held = len(entry.tokens) >= len(tokens) and entry.common(cache.key, tokens) == len(tokens)
                if held and entry.reaches(cache, len(tokens)):
                    self._touch(entry)
                    return True
        found = content()
        if sum(array.nbytes for array in found.values()) > self.budget:
            return False
        new = PrefixEntry(cache.key, tokens, {name: _frozen(array) for name, array in found.items()})

        def added(entries: tuple[PrefixEntry, ...]) -> tuple[PrefixEntry, ...]:
            kept = [entry for entry in entries if not entry.within(new)]
            room = self.budget - new.nbytes - sum(entry.nbytes for entry in kept)
            while room < 0:
                room += kept.pop(0).nbytes
            return (*kept, new)

        self._change(added)
        return True

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], folder: ModelFolder) -> None:
        """Write the entries of one folder's graph to a file, whole or not at all; see prefix_cache_file.py.

        Args:
            path: the file, which ends in .safetensors. An existing file of a prefix cache is replaced.
            folder: the folder. Entries of other folders' graphs are left out.

        Raises:
            CacheFormatError: `path` has another suffix, or the file would be larger than the reader accepts.
            OutputError: `path` holds something that is not a file of a prefix cache.
            OSError: the operating system refuses the write. No file is left behind.
        """
        write_prefix_cache(path, folder, [entry for entry in self._entries if entry.key[0] == folder.graph_digest])

    def load(self, path: str | os.PathLike[str], folder: ModelFolder) -> int:
        """Add the entries of a file that `save` wrote. An error leaves the cache unchanged.

        The entries count as used before those that the cache holds, in the order that they had when they were saved. If
        the budget does not hold them all, the least recently used ones are left out.

        Args:
            path: the file.
            folder: the folder that the entries have to belong to.

        Returns:
            The number of entries that were added; those that the cache already holds do not count.

        Raises:
            CacheFormatError: the file is missing or damaged, is no file of a prefix cache, or does not fit the folder.
            StaleCacheError: the entries belong to another graph.
            OSError: the operating system refuses to read an existing file.
        """
        read = read_prefix_cache(path, folder, self.budget)
        added = 0

        def joined(entries: tuple[PrefixEntry, ...]) -> tuple[PrefixEntry, ...]:
            nonlocal added
            fresh: list[PrefixEntry] = []
            for entry in read:
                if not any(entry.within(own) for own in entries):
                    fresh = [*(one for one in fresh if not one.within(entry)), entry]
            kept = [own for own in entries if not any(own.within(entry) for entry in fresh)]
            room = self.budget - sum(entry.nbytes for entry in (*fresh, *kept))
            while room < 0:
                room += fresh.pop(0).nbytes
            added = len(fresh)
            return (*fresh, *kept)

        self._change(joined)
        return added

    # -- changes ---------------------------------------------------------------------------------------------

    def _touch(self, entry: PrefixEntry) -> None:
        def touched(entries: tuple[PrefixEntry, ...]) -> tuple[PrefixEntry, ...]:
            others = tuple(other for other in entries if other is not entry)
            return entries if len(others) == len(entries) else (*others, entry)

        self._change(touched)

    def _change(self, change: Callable[[tuple[PrefixEntry, ...]], tuple[PrefixEntry, ...]]) -> None:
        """Replace the entries by `change` of them.

        If the garbage collector changes them meanwhile, on this thread and under the same lock, the change starts again
        from what it left.
        """
        with self._lock:
            while True:
                before = self._entries
                after = change(before)
                if self._entries is before:
                    self._entries = after
                    return


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    copy = np.array(array, order="C")
    copy.setflags(write=False)
    return copy


def require_prefix_cache(cache: PrefixCache | None) -> PrefixCache:
    """Return a model's prefix cache; raise RequestError if the model was opened without one."""
    if cache is None:
        raise RequestError(
            "the model was opened without a prefix cache",
            field="prefix_cache_bytes",
            got=0,
            wanted="a number of bytes",
            fix="open it with from_pretrained(..., prefix_cache_bytes=...)",
        )
    return cache

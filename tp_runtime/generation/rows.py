"""The rows of a batch: sequences that step together, with their buffers and patches, in one run of the session.

This module does not handle sampling or the end of a sequence (batch.py does). Each sequence is prefilled separately, in
a cache of its own, and `add` takes over the contents of that cache. From then on the cache only records the row's
tokens and positions, and the batch holds the keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..session import BoundPatch, Graph, KVCache
from .row_kv import StackedKV
from .row_slots import StackedSlots


class Rows(Protocol):
    """The methods of a graph's rows that batch.py uses. Rows are numbered from 0 in the order of `add`."""

    def add(self, cache: KVCache, bound: BoundPatch) -> None:
        """Append a row that continues from `cache`, which was made under `bound`. On failure, rows do not change."""

    def remove(self, row: int) -> None:
        """Remove a row; the last row gets its number."""

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run one token for every row and append it to the row's cache; return logits [rows, vocab].

        A step that fails leaves every row as it was.
        """

    def content(self, row: int) -> Mapping[str, NDArray]:
        """Return a row's keys and values [heads, filled, head dim] by graph input name, valid until the next call."""


class BatchedRows:
    """The rows of a fused graph: every step is one run over all rows, whatever their lengths and patches are.

    The attention operator takes each sequence's length from its row of the mask, and appends in place.
    """

    def __init__(self, graph: Graph, limit: int) -> None:
        self._graph = graph
        self._caches: list[KVCache] = []
        self._bounds: list[BoundPatch] = []
        folder, shape, kv_device = graph.folder, graph.folder.kv, graph.kv.device
        to_kv, shared = partial(graph.to_device, device=kv_device), kv_device == "cpu"
        self._kv = StackedKV(graph.kv.names, shape, graph.dtype, limit, folder.context_window, to_kv, shared)
        to_slots = partial(graph.to_device, device=graph.device.kind)
        self._slots = StackedSlots(folder.slots, limit, graph.dtype, graph.deltas, to_slots)
        self._binding: Any = None  # None if the rows or the capacity changed since the last step

    def add(self, cache: KVCache, bound: BoundPatch) -> None:
        """Append a row; see Rows."""
        cache.require_key(bound.key)
        if any(other.key != bound.key for other in self._bounds):
            for each in (bound, *self._bounds):
                self._graph.deltas(each)  # a patch whose deltas cannot be read fails here, not in the middle of a step
        content = self._graph.content(cache)
        self._change()
        self._kv.reserve(cache.filled + 1)
        self._kv.put(len(self._caches), content)
        cache.hand_over()
        self._caches.append(cache)
        self._bounds.append(bound)

    def remove(self, row: int) -> None:
        """Take a row out; see Rows."""
        self._change()
        last = len(self._caches) - 1
        if row != last:
            self._kv.put(row, self._kv.get(last, self._caches[last].filled))
        self._caches[row], self._bounds[row] = self._caches[last], self._bounds[last]
        del self._caches[last], self._bounds[last]

    def _change(self) -> None:
        self._kv.pull()
        self._binding = None

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run one token for every row; see Rows."""
        filled = np.array([cache.filled for cache in self._caches])
        positions = np.array([len(cache) + cache.skipped for cache in self._caches])
        total = int(filled.max()) + 1
        if total > self._kv.capacity:
            self._kv.reserve(total)
            self._binding = None
        if self._binding is None:
            self._binding = self._bind()
        mask = (np.arange(total) <= filled[:, None]).astype(np.int64)
        logits = self._graph.execute(self._binding, np.array(tokens)[:, None], mask, positions[:, None])
        for cache, token in zip(self._caches, tokens, strict=True):
            cache.tokens.append(token)
        return logits[:, 0]

    def _bind(self) -> Any:
        binding = self._graph.new_binding()
        self._slots.bind(binding, self._bounds)
        self._kv.pull()
        self._kv.bind(binding, len(self._caches))
        return binding

    def content(self, row: int) -> Mapping[str, NDArray]:
        """Keys and values of a row; see Rows."""
        self._change()
        return self._kv.get(row, self._caches[row].filled)


class SequentialRows:
    """The rows of a graph that concatenates (the `optimum` route): each row steps separately, in its own cache."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._rows: list[tuple[KVCache, BoundPatch]] = []

    def add(self, cache: KVCache, bound: BoundPatch) -> None:
        """Append a row; see Rows."""
        cache.require_key(bound.key)
        self._rows.append((cache, bound))

    def remove(self, row: int) -> None:
        """Take a row out; see Rows."""
        self._rows[row] = self._rows[-1]
        del self._rows[-1]

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run one token for every row; see Rows."""
        logits: list[NDArray[np.float32]] = []
        try:
            for token, (cache, bound) in zip(tokens, self._rows, strict=True):
                logits.append(self._graph.forward([token], cache, bound))
        except BaseException:
            for cache, _bound in self._rows[: len(logits)]:
                del cache.tokens[-1]  # if a step fails, no row has taken it
            raise
        return np.concatenate(logits)

    def content(self, row: int) -> Mapping[str, NDArray]:
        """Keys and values of a row; see Rows."""
        return self._graph.content(self._rows[row][0])


def new_rows(graph: Graph, limit: int) -> Rows:
    """Return empty rows for at most `limit` sequences that step together, each under a patch of its own.

    Only a fused graph takes several sequences of different lengths in one run.
    """
    return BatchedRows(graph, limit) if graph.folder.route == "fused" else SequentialRows(graph)

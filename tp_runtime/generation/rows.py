"""Sequences that step together: their buffers, their patches, and one run of the session for all of them.

Knows nothing of sampling or of where a sequence ends (batch.py). A sequence is prefilled alone, in a cache of its own;
`add` takes what that cache holds. From then on the cache is the row's record (its tokens and positions), and the keys
and values lie in the batch.
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
    """What batch.py needs of a graph's rows; they are numbered from 0 in the order of `add`."""

    def add(self, cache: KVCache, bound: BoundPatch) -> None:
        """Append a row that goes on from `cache`, made under `bound`. One that fails leaves the rows as they were."""

    def remove(self, row: int) -> None:
        """Take a row out; the last one moves to its number."""

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run one token for every row and append it to the row's cache; logits [rows, vocab].

        A step that fails leaves every row as it was.
        """

    def content(self, row: int) -> Mapping[str, NDArray]:
        """Keys and values of a row by graph input name, [heads, filled, head dim]; valid until the next call."""


class BatchedRows:
    """Rows of a fused graph: every step is one run over all of them, whatever their lengths and patches.

    The attention operator takes each row's length from its row of the mask, and appends in place.
    """

    def __init__(self, graph: Graph, limit: int) -> None:
        self._graph = graph
        self._caches: list[KVCache] = []
        self._bounds: list[BoundPatch] = []
        folder, shape, kv_device = graph.folder, graph.folder.kv, graph.kv.device
        to_kv, shared = partial(self._to, kv_device), kv_device == "cpu"
        self._kv = StackedKV(graph.kv.names, shape, graph.dtype, limit, folder.context_window, to_kv, shared)
        self._slots = StackedSlots(folder.slots, limit, graph.dtype, graph.deltas, partial(self._to, graph.device.kind))
        self._binding: Any = None  # None: rows or capacity changed since the last step

    def _to(self, device: str, array: NDArray) -> Any:
        return self._graph.ort.OrtValue.ortvalue_from_numpy(array, device, 0)

    def add(self, cache: KVCache, bound: BoundPatch) -> None:
        """Append a row; see Rows."""
        cache.require_key(bound.key)
        if any(other.key != bound.key for other in self._bounds):
            for each in (bound, *self._bounds):
                self._graph.deltas(each)  # those that cannot be had are refused here, and not in the middle of a step
        content = self._graph.content(cache)
        self._change()
        self._kv.reserve(cache.filled + 1)
        self._kv.put(len(self._caches), content)
        cache.buffers, cache.binding, cache.capacity, cache.start = {}, None, 0, None
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
        binding = self._graph.session.io_binding()
        self._slots.bind(binding, self._bounds)
        self._kv.pull()
        self._kv.bind(binding, len(self._caches))
        return binding

    def content(self, row: int) -> Mapping[str, NDArray]:
        """Keys and values of a row; see Rows."""
        self._change()
        return self._kv.get(row, self._caches[row].filled)


class SequentialRows:
    """Rows of a graph that concatenates (the `optimum` route): each steps by itself, in the cache it came with."""

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
                del cache.tokens[-1]  # a step that fails is one that no row has taken
            raise
        return np.concatenate(logits)

    def content(self, row: int) -> Mapping[str, NDArray]:
        """Keys and values of a row; see Rows."""
        return self._graph.content(self._rows[row][0])


def new_rows(graph: Graph, limit: int) -> Rows:
    """Room for at most `limit` sequences that step together, each under a patch of its own.

    Only a fused graph takes several sequences of different lengths in one run.
    """
    return BatchedRows(graph, limit) if graph.folder.route == "fused" else SequentialRows(graph)

"""The rows of a batch: sequences that step together, with their buffers and patches, in one run of the session.

This module does not handle sampling or the end of a sequence (batch.py does). Each sequence is prefilled separately, in
a cache of its own. `prepare` copies the contents of that cache into the batch's buffers, and from the first step on
only these hold the row's keys and values. The copies stay on the device of the buffers.

A step takes the position that it writes from the row's `tokens`, and changes nothing that the next step reads. So a
step that failed, at whatever line, is repeated by calling it again: it writes the same keys and values to the same
places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..session import (
    WINDOWED_TOTAL,
    DeviceStep,
    DeviceSteps,
    Graph,
    InPlaceBuffers,
    KVCache,
    Lengths,
    Logits,
    shift_values,
)
from .device_kv import DeviceKV
from .row import Row
from .row_kv import StackedKV
from .row_slots import StackedSlots


class Rows(Protocol):
    """The methods of a graph's rows that batch.py uses."""

    def prepare(self, rows: Sequence[Row]) -> None:
        """Get ready to step `rows`, in this order.

        A row may stay where it is, move towards the front, or be added at the end. If this fails, the rows that stepped
        before can still step.
        """

    def step(self, rows: Sequence[Row]) -> Logits:
        """Run the last id of every row. A step that fails may be tried again.

        Returns:
            Logits [rows, vocab], or for each row the largest ones, if these suffice for every row's sampler.
        """

    def content(self, row: Row) -> Mapping[str, NDArray]:
        """Return a row's keys and values [heads, filled, head dim] by graph input name, valid until the next call."""


class BatchedRows:
    """The rows of a fused graph: every step is one run over all rows, whatever their lengths and patches are.

    The attention operator takes each sequence's length from its row of the mask, and appends in place.
    """

    def __init__(self, graph: Graph, limit: int) -> None:
        self._graph = graph
        assert isinstance(graph.kv, InPlaceBuffers)
        folder, kv, copies = graph.folder, graph.kv, graph.kv.copies
        self._kv: StackedKV | DeviceKV
        self._contents: Callable[[KVCache], Mapping[str, Any]]  # what a cache holds, in the form that `put` takes
        if copies is None:
            to_kv = partial(graph.to_device, device="cpu")
            self._kv = StackedKV(kv.names, kv.windowed, folder.kv, graph.dtype, limit, folder.context_window, to_kv)
            self._contents = graph.content
        else:
            self._kv = DeviceKV(kv.names, kv.windowed, folder.kv, limit, folder.context_window, copies)
            self._contents = graph.device_content
        to_slots = partial(graph.to_device, device=graph.device.kind)
        self._slots = StackedSlots(folder.slots, limit, graph.dtype, to_slots)
        # For each row of the buffers the sequence whose keys and values it holds; None while they are written.
        self._held: list[Row | None] = []
        self._binding: Any = None  # None if the rows or the buffers changed since the last step
        self._io: DeviceStep | None = None  # the inputs and outputs of steps on a device
        self._shifts: Mapping[str, Any] = {}  # the lengths of windowed layers that are bound; they must stay alive

    def prepare(self, rows: Sequence[Row]) -> None:
        """Copy the rows to their places in the buffers; see Rows."""
        if self._held == rows:
            return
        for row in rows:
            row.cache.require_key(row.bound.key)
            row.follow()
        self._binding = None  # this comes first: without a binding no run writes to the buffers
        if not any(row in self._held for row in rows):
            self._held = []
        self._kv.fit(_after_a_step([row.cache.lengths for row in rows]), len(self._held))
        for place, row in enumerate(rows):
            if place < len(self._held) and self._held[place] is row:
                continue
            # Rows only move towards the front, so whatever stands here has left or was moved further to the front.
            at = self._held.index(row) if row in self._held else None
            self._held[place : place + 1] = [None]
            if at is None:
                self._kv.put(place, self._contents(row.cache))
            else:
                self._kv.move(at, place, row.cache.lengths)
            self._held[place] = row
        del self._held[len(rows) :]

    def step(self, rows: Sequence[Row]) -> Logits:
        """Run the last id of every row; see Rows."""
        self.prepare(rows)
        for row in rows:
            row.follow()
        held = [row.cache.lengths for row in rows]
        positions = np.array([len(row.cache) + row.cache.skipped for row in rows])
        lengths = _after_a_step(held)
        if not self._kv.has_room(lengths):
            self._binding = None
            self._kv.fit(lengths, len(rows))
        if self._binding is None:
            self._binding = self._bind(rows)
        shifts = [windowed - full for full, windowed in held]
        if self._graph.device_steps is not None:
            return self._step_on_device(self._graph.device_steps, rows, held, shifts, lengths)
        if any(shifts):
            self._shifts = shift_values(self._graph.ort, shifts, lengths.windowed - lengths.full)
            for name, value in self._shifts.items():
                self._binding.bind_ortvalue_input(name, value)
        filled = np.array([full for full, _windowed in held])
        mask = (np.arange(lengths.full) <= filled[:, None]).astype(np.int64)
        last = np.array([row.tokens[-1] for row in rows])
        return self._graph.execute(self._binding, last[:, None], mask, positions[:, None])[:, 0]

    def _step_on_device(
        self,
        device_steps: DeviceSteps,
        rows: Sequence[Row],
        held: Sequence[Lengths],
        shifts: Sequence[int],
        lengths: Lengths,
    ) -> Logits:
        if self._io is None or self._io.rows != len(rows):
            self._io = device_steps.new(len(rows))
        if any(shifts):  # the longest length is read on the host
            self._shifts = shift_values(self._graph.ort, shifts, lengths.windowed - lengths.full)
            self._binding.bind_ortvalue_input(WINDOWED_TOTAL, self._shifts[WINDOWED_TOTAL])
        return device_steps.run(
            self._io,
            self._binding,
            [row.tokens[-1] for row in rows],
            [len(row.cache) + row.cache.skipped for row in rows],
            [1 + full for full, _windowed in held],
            shifts,
            [row.sampler.best for row in rows],
        )

    def _bind(self, rows: Sequence[Row]) -> Any:
        binding = self._graph.new_binding()
        self._slots.bind(binding, [row.bound for row in rows])
        self._kv.bind(binding, len(rows))
        for row in rows:  # the steps write to the batch's buffers, so those of the row's own cache are out of date
            row.cache.hand_over()
        return binding

    def content(self, row: Row) -> Mapping[str, NDArray]:
        """Keys and values of a row; see Rows."""
        row.follow()
        if row not in self._held:
            return self._graph.content(row.cache)
        return self._kv.get(self._held.index(row), row.cache.lengths)


def _after_a_step(held: Sequence[Lengths]) -> Lengths:
    """Return the positions that the longest row needs for a step, by kind of layer, if the rows hold `held` before."""
    return Lengths(*(1 + max((lengths[kind] for lengths in held), default=0) for kind in range(2)))


class SequentialRows:
    """The rows of a graph that concatenates (the `optimum` route): each row steps separately, in its own cache."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def prepare(self, rows: Sequence[Row]) -> None:
        """Check the rows' caches; see Rows."""
        for row in rows:
            row.cache.require_key(row.bound.key)

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run the last id of every row; see Rows."""
        logits: list[NDArray[np.float32]] = []
        for row in rows:
            # A step that failed at a later row may have run this row's id.
            kept = row.cache.keep_prefix(row.tokens, row.held)
            logits.append(self._graph.forward(row.tokens[kept:], row.cache, row.bound, held=row.held))
        return np.concatenate(logits)

    def content(self, row: Row) -> Mapping[str, NDArray]:
        """Keys and values of a row; see Rows."""
        return self._graph.content(row.cache)


def new_rows(graph: Graph, limit: int) -> Rows:
    """Return empty rows for at most `limit` sequences that step together, each under a patch of its own.

    Only a fused graph takes several sequences of different lengths in one run.
    """
    return BatchedRows(graph, limit) if graph.folder.route == "fused" else SequentialRows(graph)

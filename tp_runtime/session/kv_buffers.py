"""This module manages the key/value buffers of a graph between steps, in one variant for each export route.

fused    The attention operator appends in place. One buffer with room to grow is bound as past and as present.
optimum  The graph concatenates. The past is exactly as long as the tokens run so far, and every step returns a new,
         longer tensor.

The buffers of windowed layers have lengths of their own, where a patch stores another number of entries for them than
for full layers (layer_kinds.py), or where they dropped positions that are not needed any more (windows.py). The cache's
`shift` says by how much. On the CPU, the part of these buffers that is bound begins at the first position that the
window shows the next id; the bound lengths count from there. Every few dozen steps the next part is bound. On CUDA
these buffers are bound as a whole, because steps there have not been tried with parts.

In both variants a failed run leaves the tokens of the cache as they were, and a cache that was rewound
(KVCache.keep_prefix) continues from the tokens it kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..patch import KV_PARTS
from .bound_patch import BoundPatch
from .description import past_name, present_name
from .device_copies import DeviceCopies
from .interface import WINDOWED_SHIFT, WINDOWED_TOTAL
from .kv_cache import ALWAYS, KVCache
from .model_folder import ModelFolder
from .slots import check_rows
from .windows import SLIDE, WindowPlan

_FIRST_CAPACITY = 256
_UNKNOWN = -1


def grown_capacity(capacity: int, length: int, window: int) -> int:
    """Return the capacity, in positions, of a buffer that must grow to hold `length` positions; at most `window`.

    The capacity doubles until it suffices, because every growth copies the buffer.
    """
    capacity = max(_FIRST_CAPACITY, capacity)
    while capacity < length:
        capacity *= 2
    return min(capacity, window)


def shift_values(ort: Any, shifts: Sequence[int], total: int) -> dict[str, Any]:
    """Return the lengths of windowed layers as inputs of a graph that has layers of both kinds.

    With nothing bound, these lengths are those of full layers.

    Args:
        ort: the onnxruntime module.
        shifts: for each row the number of positions that its windowed layers hold more than its full ones.
        total: the same difference between the longest lengths among the rows.

    Returns:
        OrtValues on the host by graph input name. A binding does not keep them alive.
    """
    values = {WINDOWED_SHIFT: shifts, WINDOWED_TOTAL: [total]}
    return {name: ort.OrtValue.ortvalue_from_numpy(np.array(value, np.int32)) for name, value in values.items()}


class _KVBuffers:
    """The parts that both variants share.

    Args:
        folder: the model folder of the graph.
        session: the graph's session.
        ort: the onnxruntime module.
        device: the device that the attention operator runs on, `cpu` or `cuda`.
        dtype: the dtype of keys and values.
        window_cache: whether windowed layers drop what no later id attends to (windows.py).

    Attributes:
        plan: what the windowed layers keep; None if the graph has one cache length for all layers.
        device: the device that the buffers are on, which is the attention operator's.
        windowed: the graph inputs of windowed layers; empty if the graph has one cache length for all layers.
        names: the names (graph input, graph output) of every key and value tensor, in the order in which they are
            bound.
    """

    def __init__(
        self, folder: ModelFolder, session: Any, ort: Any, device: str, dtype: np.dtype, window_cache: bool = False
    ) -> None:
        self._kv, self._window = folder.kv, folder.context_window
        self.plan = None if folder.windowed is None else WindowPlan(folder.windowed.window, window_cache)
        self._shows_parts = self.plan is not None and device == "cpu"
        self._session, self.device, self._dtype = session, device, dtype
        self._ort, self._from_numpy = ort, ort.OrtValue.ortvalue_from_numpy
        parts = [(layer, part) for layer in range(folder.layers) for part in KV_PARTS]
        self.names = [(past_name(*part), present_name(*part)) for part in parts]
        self._entry = {past: part for part, (past, _present) in zip(parts, self.names, strict=True)}
        windowed = () if folder.windowed is None else folder.windowed.layers
        self.windowed = frozenset(past for past, (layer, _part) in self._entry.items() if layer in windowed)
        of_each_kind = {past in self.windowed: past for past in self._entry}
        self._of_each_kind = tuple(of_each_kind.values())

    def _value(self, length: int, content: Any = None) -> Any:
        """Return a device buffer of `length` positions: first `content` [1, heads, kept, head dim], then zeros."""
        return self._from_numpy(self._array(length, content), self.device, 0)

    def _array(self, length: int, content: Any) -> NDArray[Any]:
        # A part of a buffer of several heads is as long as the buffer, so its last head ends behind the buffer's end.
        # Nothing reads or writes what is behind it, and the system gives no memory to what nothing touches.
        spare = 1 if self._shows_parts and self._kv.heads > 1 else 0
        array = np.zeros((1, self._kv.heads + spare, length, self._kv.head_dim), self._dtype)[:, : self._kv.heads]
        if content is not None:
            array[:, :, : content.shape[2]] = content
        return array

    def content(self, cache: KVCache, past: str) -> Any:
        """Return the filled part of one tensor of a cache, [1, heads, filled, head dim]; None if the cache is empty.

        The data comes from the cache's buffers. A cache without buffers yet gives its `start`, or else its patch's KV
        prefix.
        """
        if past in cache.buffers:
            return cache.buffers[past].numpy()[:, :, : self._filled(cache, past)]
        if cache.start is not None:
            return cache.start[past][None, :, : self._filled(cache, past)]
        return None if cache.prefix is None else cache.prefix.entries[self._entry[past]].transpose(1, 0, 2)[None]

    def _filled(self, cache: KVCache, past: str) -> int:
        """Return the number of filled positions of one tensor."""
        return cache.filled + (cache.shift if past in self.windowed else 0)

    def _room(self, cache: KVCache, buffers: dict[str, Any]) -> int:
        """Return the number of positions of full layers up to which all buffers have room."""
        lengths = {past: buffers[past].shape()[2] for past in self._of_each_kind}
        return min(length - (cache.shift if past in self.windowed else 0) for past, length in lengths.items())

    def _new_binding(self, cache: KVCache, patch: BoundPatch) -> Any:
        values = patch.values
        check_rows(values, 1)
        cache.values = values  # while the cache refers to them, its patch is never converted a second time
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        return binding


class InPlaceBuffers(_KVBuffers):
    """One buffer for each tensor, which a run reads as past and writes as present; it doubles when it is full.

    Attributes:
        copies: what copies buffers on another device than the host, so that they grow without crossing the bus; None
            if the buffers are on the host.
    """

    copies: DeviceCopies | None = None

    def prepare(self, cache: KVCache, length: int, patch: BoundPatch) -> None:
        """Bind buffers with room for `length` positions of full layers, and `patch`, to `cache.binding`."""
        filled = cache.filled
        if length > cache.capacity:
            surplus = 0 if self.plan is None else self.plan.surplus(filled + cache.shift, length - filled)
            buffers = {}
            for past, _present in self.names:
                before = cache.buffers[past].shape()[2] if cache.capacity else 0
                wanted, limit, skipped = length, self._window, 0
                if past in self.windowed:
                    assert self.plan is not None
                    wanted, limit = length + cache.shift - surplus, self.plan.limit or limit
                    skipped = surplus
                buffers[past] = self._grown(cache, past, grown_capacity(before, wanted, limit), skipped)
            self.hold(cache, buffers, patch, cache.dropped + surplus)
        if filled not in cache.shown:
            self._show(cache)

    def hold(self, cache: KVCache, buffers: dict[str, Any], patch: BoundPatch, dropped: int | None = None) -> None:
        """Make `cache` run in `buffers`, which hold its contents: bind them and `patch` to a new binding of its own.

        Args:
            cache: the cache.
            buffers: the buffers, by graph input name.
            patch: the patch.
            dropped: the number of positions that the windowed layers lack in these buffers; by default as before.
        """
        binding = self._new_binding(cache, patch)
        for past, present in self.names:
            binding.bind_ortvalue_input(past, buffers[past])
            binding.bind_ortvalue_output(present, buffers[past])
        cache.replace_buffers(buffers, binding, cache.dropped if dropped is None else dropped)
        cache.shown = ALWAYS
        if self.windowed:
            self._bind_lengths(cache, 0)
        cache.capacity = self._room(cache, buffers)
        cache.start = None

    def _show(self, cache: KVCache) -> None:
        """Bind the part of the buffers of windowed layers that begins with what the next id needs."""
        assert self.plan is not None
        cache.shown = range(0)  # an interrupt below leaves parts of different lengths, which no run uses
        cache.step = None  # it was made for what was shown before
        first = self.plan.first_shown(cache.filled + cache.shift)
        heads, head_dim = self._kv.heads, self._kv.head_dim
        for past, present in self.names:
            if past not in self.windowed:
                continue
            buffer = cache.buffers[past]
            length = buffer.shape()[2]
            shape = [1, heads, length - first if heads == 1 else length, head_dim]
            at = buffer.data_ptr() + first * head_dim * self._dtype.itemsize
            cache.binding.bind_input(past, "cpu", 0, self._dtype, shape, at)
            cache.binding.bind_output(present, "cpu", 0, self._dtype, shape, at)
        self._bind_lengths(cache, first)

    def _bind_lengths(self, cache: KVCache, first: int) -> None:
        """Bind the lengths of windowed layers if their buffers are bound from position `first`."""
        values = shift_values(self._ort, [cache.shift - first], cache.shift - first)
        for name, value in values.items():
            cache.binding.bind_ortvalue_input(name, value)
        cache.bound_lengths = values
        if self._shows_parts and self.copies is None:
            assert self.plan is not None
            # A text that goes back in front of this part needs another one, and so does one that grows far beyond it.
            filled = cache.filled if first else self.plan.hidden - cache.shift
            cache.shown = range(filled if first or cache.dropped else 0, filled + SLIDE)

    def _grown(self, cache: KVCache, past: str, capacity: int, skipped: int) -> Any:
        """Return a buffer of `capacity` positions: first the content of one tensor of the cache, then zeros.

        The first `skipped` positions of the content are left out.
        """
        if self.copies is None:
            content = self.content(cache, past)
            return self._value(capacity, None if content is None else content[:, :, skipped:])
        buffer = self.copies.new((1, self._kv.heads, capacity, self._kv.head_dim))
        source, target = self.device_content(cache, past), self.copies.rows(buffer)
        if source is None:
            self.copies.clear(target)
        else:
            self.copies.copy(self.copies.rows(source), target, skipped)
        return buffer

    def device_content(self, cache: KVCache, past: str) -> Any:
        """Return one tensor of a cache as an OrtValue on the device of `copies`, with at least the filled positions.

        A content that is on the host is sent to the device: that of a prefix cache, of a patch, or of a cache that lost
        its buffers. The result is None if the cache is empty.
        """
        assert self.copies is not None
        buffer = cache.buffers.get(past)
        if buffer is not None and buffer.device_name() == self.device:
            return buffer
        content = self.content(cache, past)
        return None if content is None or not content.size else self.copies.to_device(content)

    def fixed_buffers(self, capacity: int) -> dict[str, Any]:
        """Return buffers of zeros, by graph input name, in which sequences run one after another (cuda_graphs.py)."""
        return {past: self._value(capacity) for past, _present in self.names}

    def refill(self, buffer: Any, content: NDArray[Any]) -> None:
        """Overwrite a buffer in place: first `content` [1, heads, kept, head dim], then zeros."""
        buffer.update_inplace(self._array(buffer.shape()[2], content))

    def adopt(self, cache: KVCache) -> None:
        """Do nothing: a run writes its keys and values to the place where the next run reads them."""


class ConcatenatedBuffers(_KVBuffers):
    """A tensor of exact length for each past; the present that a run returns becomes the past of the next run.

    The presents belong to the binding that returned them: ONNX Runtime 1.24 takes them back when an output of that
    binding is bound again. So a run never uses the binding that made its pasts, and two bindings take turns.
    """

    def prepare(self, cache: KVCache, length: int, patch: BoundPatch) -> None:
        """Bind to `cache.binding` a past of exactly the cache's length, outputs for ORT to allocate, and `patch`."""
        if cache.binding is None or cache.binding is cache.made_by:
            cache.binding, cache.spare = cache.spare or self._new_binding(cache, patch), None
        for past, present in self.names:
            if past not in cache.buffers or cache.capacity != cache.filled:  # the cache is new or was rewound
                cache.buffers[past] = self._value(self._filled(cache, past), self.content(cache, past))
            cache.binding.bind_ortvalue_input(past, cache.buffers[past])
            cache.binding.bind_output(present, self.device, 0)  # the output of the last run has the last run's length
        cache.capacity = cache.filled
        cache.start = None

    def adopt(self, cache: KVCache) -> None:
        """Store the keys and values that a run returned as the cache's buffers."""
        *presents, _logits = cache.binding.get_outputs()  # the outputs come in the order in which they were first bound
        cache.capacity = _UNKNOWN  # an interrupt below leaves buffers of different lengths
        for (past, _present), value in zip(self.names, presents, strict=True):
            cache.buffers[past] = value
        cache.spare, cache.made_by = cache.made_by, cache.binding
        cache.capacity = self._room(cache, cache.buffers)

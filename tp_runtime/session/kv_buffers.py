"""How a graph's keys and values live between steps: one way for each export route.

fused    the attention operator appends in place: one buffer with room to grow is bound as past and as present.
optimum  the graph concatenates: past is exactly as long as what was run, and every step returns it anew, longer.

Either way a failed run leaves the tokens of the cache as they were, and a rewound cache (KVCache.keep_prefix) goes on
from the tokens it kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..patch import KV_PARTS
from .kv_cache import KVCache
from .model_folder import ModelFolder
from .slots import check_rows

_FIRST_CAPACITY = 256


def grown_capacity(capacity: int, length: int, window: int) -> int:
    """Positions of a buffer that has become too short for `length`: doubled, for copying it costs; at most `window`."""
    capacity = max(_FIRST_CAPACITY, capacity)
    while capacity < length:
        capacity *= 2
    return min(capacity, window)


class _KVBuffers:
    """What both ways need.

    Args:
        folder: of the graph.
        session: its session.
        ort: the onnxruntime module.
        device: `cpu` or `cuda`, where the attention operator runs.
        dtype: of keys and values.

    Attributes:
        device: where the buffers are: the same.
        names: (graph input, graph output) of every tensor, in the order in which they are bound.
    """

    def __init__(self, folder: ModelFolder, session: Any, ort: Any, device: str, dtype: np.dtype) -> None:
        self._kv, self._window = folder.kv, folder.context_window
        self._session, self.device, self._dtype = session, device, dtype
        self._from_numpy = ort.OrtValue.ortvalue_from_numpy
        parts = [(layer, part) for layer in range(folder.layers) for part in KV_PARTS]
        self.names = [(f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for layer, part in parts]
        self._entry = {past: part for part, (past, _present) in zip(parts, self.names, strict=True)}

    def _value(self, length: int, content: Any = None) -> Any:
        """A buffer on the device with `length` places, the first of them filled from [1, heads, kept, head dim]."""
        return self._from_numpy(self._array(length, content), self.device, 0)

    def _array(self, length: int, content: Any) -> NDArray[Any]:
        array = np.zeros((1, self._kv.heads, length, self._kv.head_dim), self._dtype)
        if content is not None:
            array[:, :, : content.shape[2]] = content
        return array

    def content(self, cache: KVCache, past: str) -> Any:
        """What a cache holds of one tensor, [1, heads, filled, head dim], or None of nothing.

        From its buffers, or before it has any: what it starts with, or its patch's prefix.
        """
        if past in cache.buffers:
            return cache.buffers[past].numpy()[:, :, : cache.filled]
        if cache.start is not None:
            return cache.start[past][None, :, : cache.filled]
        return None if cache.prefix is None else cache.prefix.entries[self._entry[past]].transpose(1, 0, 2)[None]

    def _new_binding(self, patch: dict[str, Any]) -> Any:
        check_rows(patch, 1)
        binding = self._session.io_binding()
        for name, value in patch.items():
            binding.bind_ortvalue_input(name, value)
        return binding


class InPlaceBuffers(_KVBuffers):
    """One buffer a tensor, read as past and written as present; doubled when it is full."""

    def prepare(self, cache: KVCache, length: int, patch: dict[str, Any]) -> None:
        """Bind buffers with room for `length` positions, and `patch`, to `cache.binding`."""
        if length <= cache.capacity:
            return
        capacity = grown_capacity(cache.capacity, length, self._window)
        self.hold(cache, {past: self._value(capacity, self.content(cache, past)) for past, _ in self.names}, patch)

    def hold(self, cache: KVCache, buffers: dict[str, Any], patch: dict[str, Any]) -> None:
        """Let `cache` run in `buffers`, which hold what it held: bind them, and `patch`, to a binding of its own."""
        binding = self._new_binding(patch)
        for past, present in self.names:
            binding.bind_ortvalue_input(past, buffers[past])
            binding.bind_ortvalue_output(present, buffers[past])
        cache.buffers, cache.binding = buffers, binding
        cache.capacity = buffers[self.names[0][0]].shape()[2]
        cache.start = None

    def fixed_buffers(self, capacity: int) -> dict[str, Any]:
        """Buffers of zeros that one sequence after the other will run in (cuda_graphs.py), by graph input name."""
        return {past: self._value(capacity) for past, _present in self.names}

    def refill(self, buffer: Any, content: NDArray[Any]) -> None:
        """Overwrite a buffer where it lies: `content` [1, heads, kept, head dim] in its first places, then zeros."""
        buffer.update_inplace(self._array(buffer.shape()[2], content))

    def adopt(self, cache: KVCache) -> None:
        """Nothing to do after a run: it wrote where the next one reads."""


class ConcatenatedBuffers(_KVBuffers):
    """Each step's present becomes the next step's past."""

    def prepare(self, cache: KVCache, length: int, patch: dict[str, Any]) -> None:
        """Bind a past of exactly what `cache` holds, outputs to be allocated, and `patch`, to `cache.binding`."""
        if cache.binding is None:
            cache.binding = self._new_binding(patch)
        for past, present in self.names:
            if past not in cache.buffers or cache.capacity != cache.filled:  # new, or rewound
                cache.buffers[past] = self._value(cache.filled, self.content(cache, past))
            cache.binding.bind_ortvalue_input(past, cache.buffers[past])
            cache.binding.bind_output(present, self.device, 0)  # anew: the last run's has the last run's length
        cache.capacity = cache.filled
        cache.start = None

    def adopt(self, cache: KVCache) -> None:
        """Keep what a run returned."""
        *presents, _logits = cache.binding.get_outputs()  # in the order in which they were first bound
        for (past, _present), value in zip(self.names, presents, strict=True):
            cache.buffers[past] = value
        cache.capacity = presents[0].shape()[2]

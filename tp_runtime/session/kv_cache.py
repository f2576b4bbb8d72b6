"""The KV cache of one sequence, which belongs to one patch.

A patch changes the keys and values of every later layer, so a cache made under one patch is wrong under another. Each
cache stores the key it was made under, and the graph refuses to run it under any other key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ..errors import StaleCacheError
from ..patch import KVPrefix
from .step_io import StepIO

# The graph digest and the ordered terms (patch identity, strength); the base has no terms.
CacheKey = tuple[str, tuple[tuple[str, float], ...]]


@dataclass
class KVCache:
    """The keys and values of the tokens run so far. Only one run at a time may use a cache.

    Attributes:
        key: the graph and the patch that the cache was made under.
        prefix: the entries that the patch puts at the front, which stand in for the first ids of every prompt.
        tokens: the ids that the cache holds, in order, including those that `prefix` stands in for.
        capacity: the length of the buffers, in positions.
        buffers: the buffers [1, kv heads, capacity, head dim] on the device, by graph input name; kv_buffers.py
            describes how they grow. If `capacity` is 0, they are a copy on the host, [1, kv heads, filled, head dim],
            which the next run copies to the device.
        binding: the ONNX Runtime binding that holds the buffers; it is reused from step to step.
        start: the first contents of the buffers, [kv heads, filled, head dim], by graph input name; they are read and
            never written.
        step: the ids and logits that are bound to `binding` since the last decode step; None after any other run.
    """

    key: CacheKey
    prefix: KVPrefix | None = None
    capacity: int = 0
    tokens: list[int] = field(default_factory=list)
    buffers: dict[str, Any] = field(default_factory=dict)
    binding: Any = None
    start: Mapping[str, NDArray[Any]] | None = None
    step: StepIO | None = None

    def __post_init__(self) -> None:
        if self.prefix is not None and not self.tokens:
            self.tokens.extend(self.prefix.replaces)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def filled(self) -> int:
        """The number of filled positions. A prefix counts by its own entries, not by the ids that it replaces."""
        if self.prefix is None:
            return len(self.tokens)
        return len(self.prefix) + len(self.tokens) - len(self.prefix.replaces)

    @property
    def skipped(self) -> int:
        """The difference between the next id's position and the number of ids before it."""
        return 0 if self.prefix is None else self.prefix.skipped

    def require_start(self, tokens: Sequence[int]) -> None:
        """Raise RequestError unless a prompt of `tokens` can follow the prefix."""
        if self.prefix is not None:
            self.prefix.require_start(tokens)

    def require_key(self, key: CacheKey) -> None:
        """Raise StaleCacheError unless the cache was made under `key`."""
        if self.key != key:
            raise StaleCacheError(
                "the KV cache was made under another patch",
                field="cache",
                got=_describe(self.key),
                wanted=_describe(key),
                fix="start a new cache after a switch",
            )

    def keep_prefix(self, tokens: list[int]) -> int:
        """Drop all tokens after the longest common prefix with `tokens`; returns the length of that common prefix.

        The common prefix never includes the last of `tokens`, because the logits of that token are needed to continue.

        Raises:
            RequestError: `tokens` cannot follow the patch's KV prefix.
        """
        self.require_start(tokens)
        common = min(len(self.tokens), len(tokens) - 1)
        if self.tokens[:common] != tokens[:common]:  # in a decode step nothing differs, and one comparison in C is fast
            pairs = zip(self.tokens, tokens, strict=False)
            common = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        del self.tokens[common:]
        return common


def _describe(key: CacheKey) -> str:
    graph, terms = key
    patches = ", ".join(f"{identity[:12]}@{strength:g}" for identity, strength in terms)
    return f"graph {graph[:12]}, {patches or 'no patch'}"

"""The KV cache of one sequence, which belongs to one patch.

A patch changes every later layer's keys and values, so a cache made under one is wrong under another. Each cache
carries the key it was made under, and the graph refuses to run it under any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ..errors import StaleCacheError
from ..patch import KVPrefix
from .step_io import StepIO

# (graph digest, ordered (patch identity, strength) terms); () is the base.
CacheKey = tuple[str, tuple[tuple[str, float], ...]]


@dataclass
class KVCache:
    """Keys and values of the tokens run so far, for one run at a time.

    Attributes:
        key: what the cache was made under.
        prefix: entries that the patch puts in front, which stand in for the first ids of every prompt.
        tokens: the ids in it, in order, those that `prefix` stands in for included.
        capacity: positions its buffers are long.
        buffers: graph input name -> buffer [1, kv heads, capacity, head dim] on the device; kv_buffers.py says how they
            grow. With capacity 0 a copy on the host, [1, kv heads, filled, head dim], that the next run puts back.
        binding: the ONNX Runtime binding that holds the buffers, kept between steps.
        start: what the buffers begin with, by graph input name, [kv heads, filled, head dim]; read, never written.
        step: the ids and logits that `binding` has bound since the last decode step; None after any other run.
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
        """Positions of the buffers in use: one for each id, or for each entry of the prefix and each id after it."""
        if self.prefix is None:
            return len(self.tokens)
        return len(self.prefix) + len(self.tokens) - len(self.prefix.replaces)

    @property
    def skipped(self) -> int:
        """How much further the next id's position is than the number of ids before it."""
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
        """Forget everything after the longest common prefix with `tokens`; returns its length.

        At least the last of `tokens` is left to run, since its logits are what a continuation starts from.

        Raises:
            RequestError: `tokens` cannot follow the cache's prefix.
        """
        self.require_start(tokens)
        common = min(len(self.tokens), len(tokens) - 1)
        if self.tokens[:common] != tokens[:common]:  # one comparison in C where nothing differs: every decode step
            pairs = zip(self.tokens, tokens, strict=False)
            common = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        del self.tokens[common:]
        return common


def _describe(key: CacheKey) -> str:
    graph, terms = key
    patches = ", ".join(f"{identity[:12]}@{strength:g}" for identity, strength in terms)
    return f"graph {graph[:12]}, {patches or 'no patch'}"

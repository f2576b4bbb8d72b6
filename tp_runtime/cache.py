"""The KV cache of one sequence, which belongs to one patch.

A patch changes every later layer's keys and values, so a cache made under one is wrong under another. Each cache
carries the key it was made under, and the graph refuses to run it under any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# (graph digest, ordered (patch identity, strength) terms); () is the base.
CacheKey = tuple[str, tuple[tuple[str, float], ...]]


@dataclass
class KVCache:
    """Keys and values of the tokens run so far.

    Attributes:
        key: what the cache was made under.
        tokens: the ids in it, in order.
        capacity: tokens it has room for before the graph grows it.
        buffers: graph input name -> device buffer [1, kv heads, capacity, head dim], read and written in place.
        binding: the ONNX Runtime binding that holds the buffers, kept between steps.
    """

    key: CacheKey
    capacity: int = 0
    tokens: list[int] = field(default_factory=list)
    buffers: dict[str, Any] = field(default_factory=dict)
    binding: Any = None

    def __len__(self) -> int:
        return len(self.tokens)

    def keep_prefix(self, tokens: list[int]) -> int:
        """Forget everything after the longest common prefix with `tokens`; returns its length.

        At least the last of `tokens` is left to run, since its logits are what a continuation starts from.
        """
        common = 0
        for ours, theirs in zip(self.tokens, tokens[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        del self.tokens[common:]
        return common

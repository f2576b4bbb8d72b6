"""One entry of the prefix cache: the keys and values of some ids, under one cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..session import CacheKey, KVCache

Content = Mapping[str, NDArray[Any]]  # graph input name -> [heads, filled, head dim], `filled` by kind of layer


@dataclass(frozen=True, eq=False)
class PrefixEntry:
    """An entry, which is never written to.

    Attributes:
        key: the graph, and the patches with their strengths.
        tokens: the ids, those that a patch's KV prefix stands in for included.
        content: the keys and values.
    """

    key: CacheKey
    tokens: NDArray[np.int64]
    content: Content

    @property
    def nbytes(self) -> int:
        """The number of bytes of the keys and values."""
        return sum(array.nbytes for array in self.content.values())

    def common(self, key: CacheKey, tokens: NDArray[np.int64]) -> int:
        """Return the number of ids that both start with; 0 under another key."""
        if key != self.key:
            return 0
        length = min(len(tokens), len(self.tokens))
        differ = self.tokens[:length] != tokens[:length]
        return int(differ.argmax()) if differ.any() else length

    def fits(self, cache: KVCache) -> bool:
        """Return whether the arrays are as long as the ids and the patch's KV prefix say, for a cache of the key."""
        lead = 0 if cache.prefix is None else len(cache.prefix.replaces)
        lengths = {len(self.tokens) - lead + count for count in cache.entries}
        return {array.shape[1] for array in self.content.values()} <= lengths

    def within(self, other: PrefixEntry) -> bool:
        """Return whether `other` holds these ids under the same key, and perhaps more."""
        return other.common(self.key, self.tokens) == len(self.tokens)

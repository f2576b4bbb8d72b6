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
        """Return whether the arrays are as long as the ids and the patch's KV prefix say, for a cache of the key.

        Those of windowed layers may lack positions that the window does not show the next id.
        """
        full, windowed = self._positions(cache)
        if any(array.shape[1] != full for past, array in self.content.items() if past not in cache.windowed):
            return False
        held = {array.shape[1] for past, array in self.content.items() if past in cache.windowed}
        return held <= {windowed} or (len(held) == 1 and min(windowed, cache.window - 1) <= max(held) < windowed)

    def dropped(self, cache: KVCache) -> int:
        """Return the number of positions at the front that the arrays of windowed layers lack."""
        return self._positions(cache)[1] - self.content[next(iter(cache.windowed))].shape[1] if cache.windowed else 0

    def reaches(self, cache: KVCache, common: int) -> bool:
        """Return whether `cache` could go on after the first `common` ids: the entry holds what the window shows."""
        dropped = self.dropped(cache)
        held = self._positions(cache)[1] - dropped - (len(self.tokens) - common)
        return not dropped or held >= cache.window - 1

    def _positions(self, cache: KVCache) -> tuple[int, int]:
        """Return the number of positions of full and of windowed layers at which the ids end."""
        lead = 0 if cache.prefix is None else len(cache.prefix.replaces)
        return len(self.tokens) - lead + cache.entries.full, len(self.tokens) - lead + cache.entries.windowed

    def within(self, other: PrefixEntry) -> bool:
        """Return whether `other` holds these ids under the same key, with all that this entry holds of them."""
        further = len(other.tokens) - len(self.tokens)
        return other.common(self.key, self.tokens) == len(self.tokens) and all(
            array.shape[1] <= other.content[past].shape[1] - further for past, array in self.content.items()
        )

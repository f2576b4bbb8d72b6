"""A fake graph without weights or ONNX Runtime, for tests of the generation loops.

The next token depends on every token in the cache and on the patch, so a cache with wrong content changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tp_runtime.errors import RequestError
from tp_runtime.session import BoundPatch, KVCache, Use

VOCAB = 50
BASE = BoundPatch(dict, ("graph", ()))
PATCH = BoundPatch(dict, ("graph", (("p", 1.0),)))


class FakeGraph:
    """A graph whose forward passes are arithmetic on the tokens.

    The second most likely token is the most likely id plus one.

    Attributes:
        folder: the values of a model folder that the loops read.
        runs: the token ids of each forward pass so far.
    """

    def __init__(self, window: int = 64) -> None:
        self.folder: Any = SimpleNamespace(context_window=window, vocab_size=VOCAB, precision="fp32")
        self.runs: list[list[int]] = []

    def new_cache(self, bound: BoundPatch) -> KVCache:
        return KVCache(bound.key)

    def require_cache(self, cache: KVCache, bound: BoundPatch) -> None:
        cache.require_key(bound.key)

    def forward(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        bound: BoundPatch,
        *,
        all_logits: bool = False,
        copy: bool = True,
        last: int = 1,
        held: Use | None = None,
    ) -> np.ndarray:
        assert tokens and not all_logits
        assert len(cache) + len(tokens) <= self.folder.context_window
        self.require_cache(cache, bound)
        cache.require_free(held)
        self.runs.append(list(tokens))
        cache.tokens.extend(tokens)
        logits = np.zeros((min(last, len(tokens)), VOCAB), np.float32)
        for row, length in enumerate(range(len(cache) - len(logits) + 1, len(cache) + 1)):
            first = next_token(cache.tokens[:length], bound)
            logits[row, [first, (first + 1) % VOCAB]] = 5.0, 4.0
        return logits

    def forward_best(
        self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, *, best: int, last: int, held: Use
    ) -> np.ndarray:
        return self.forward(tokens, cache, bound, last=last, held=held)


def next_token(tokens: Sequence[int], bound: BoundPatch) -> int:
    """Return the id that the fake graph predicts after `tokens`."""
    return (sum((position + 1) * token for position, token in enumerate(tokens)) + 7 * len(bound.key[1])) % VOCAB


def expected(prompt: Sequence[int], count: int, bound: BoundPatch = BASE) -> list[int]:
    """Return the greedy completion of `count` ids."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, bound))
    return tokens[len(prompt) :]


class FakeBatchGraph(FakeGraph):
    """A fake graph for batches; its rows step one by one, like those of a graph that concatenates."""

    def __init__(self, window: int = 64) -> None:
        super().__init__(window)
        self.folder.route, self.folder.check_ids = "optimum", _check_ids


def _check_ids(tokens: Sequence[int]) -> None:
    if not all(0 <= token < VOCAB for token in tokens):
        raise RequestError("not an id", field="tokens")

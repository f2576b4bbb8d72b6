"""The generation loop, on token ids.

The engine knows nothing of text, files, names of patches or devices. It asks a graph for caches and forward steps, and
a sampler for the next id; the tests drive it with a fake graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..session import BoundPatch, KVCache, ModelFolder
from .prefix_cache import Content, PrefixCache
from .sampling import Sampler, Sampling


class Steps(Protocol):
    """What the engine needs of a graph; see graph.Graph."""

    folder: ModelFolder

    def new_cache(self, bound: BoundPatch) -> KVCache:
        """An empty cache for runs under `bound`."""

    def forward(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        bound: BoundPatch,
        *,
        all_logits: bool = False,
        lasting: bool = True,
    ) -> NDArray[np.float32]:
        """Logits [1 or len(tokens), vocab] of `tokens` after what is in `cache`; `lasting`: the caller's own."""

    def content(self, cache: KVCache) -> Content:
        """Keys and values that `cache` holds."""


def generate(
    graph: Steps,
    prompt: Sequence[int],
    bound: BoundPatch,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    cache: KVCache | None = None,
    store: PrefixCache | None = None,
) -> Iterator[int]:
    """Yield the ids of a completion, the end-of-sequence id included if it is reached.

    The prompt is run when the first id is asked for. The loop ends at an id of `eos_ids`, after `max_new_tokens`, or
    where prompt and completion fill the context window.

    Args:
        graph: where the steps are run.
        prompt: the ids so far, at least one.
        bound: the patch, for every step of this completion.
        sampling: how ids are picked.
        max_new_tokens: at least 1.
        eos_ids: ids that end a completion.
        cache: of an earlier completion under the same patch; what it shares with `prompt` is not run again. It is left
            holding everything run here, so that a conversation can go on from it. Completions that take turns on one
            cache cost each other a new prefill and nothing else.
        store: without a `cache`, where the prompt finds what was run before; it gets what is run here, after the prompt
            and at the end.

    Raises:
        RequestError: an empty prompt, one that leaves no room for a token or cannot follow the patch's KV prefix, or
            a bad `max_new_tokens`.
        StaleCacheError: `cache` was made under another patch.
    """
    if cache is not None:
        cache.require_key(bound.key)  # before anything in it is given up
        store = None
    full = check_request(graph.folder, prompt, bound, max_new_tokens)
    if cache is None:
        cache = graph.new_cache(bound)
    ids = _loop(graph, list(prompt), bound, Sampler(sampling), full, eos_ids, cache)
    return ids if store is None else _stored(graph, prompt, ids, cache, store)


def prefill(graph: Steps, prompt: Sequence[int], bound: BoundPatch, store: PrefixCache) -> None:
    """Run a prompt for what others share with it, and put its keys and values into `store`.

    Raises:
        RequestError: the prompt cannot be served, or the store cannot hold it.
    """
    check_request(graph.folder, prompt, bound, 1)
    cache = graph.new_cache(bound)
    store.fill(cache, prompt)
    graph.forward(prompt[len(cache) :], cache, bound)
    if not store.keep(cache, lambda: graph.content(cache)):
        raise RequestError(
            "the prefix cache cannot hold this prompt",
            field="prefix_cache_bytes",
            got=store.budget,
            wanted=f"at least {sum(array.nbytes for array in graph.content(cache).values())}",
            fix="open the model with a larger prefix_cache_bytes, or shorten the prompt",
        )


def check_request(folder: ModelFolder, prompt: Sequence[int], bound: BoundPatch, max_new_tokens: int) -> int:
    """Check that a prompt can be served under a patch; returns the number of tokens at which it is full.

    Raises:
        RequestError: as `generate`.
    """
    check_max_new_tokens(max_new_tokens)
    if not prompt:
        raise RequestError("the prompt is empty", field="prompt", got="0 tokens", wanted="at least one token")
    skipped = 0
    if bound.prefix is not None:
        bound.prefix.require_start(prompt)
        skipped = bound.prefix.skipped
    window = folder.context_window - skipped
    if len(prompt) >= window:
        raise RequestError(
            "the prompt leaves no room in the context window",
            field="prompt",
            got=f"{len(prompt)} tokens",
            wanted=f"at most {window - 1}",
            fix="shorten the prompt, or put its fixed part into a patch",
        )
    return min(len(prompt) + max_new_tokens, window)


def check_max_new_tokens(value: int) -> None:
    """Raise RequestError unless `value` is a whole number of tokens, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(
            "not a number of tokens", field="max_new_tokens", got=repr(value), wanted="a whole number >= 1"
        )


def _loop(
    graph: Steps,
    tokens: list[int],
    bound: BoundPatch,
    sampler: Sampler,
    full: int,
    eos_ids: frozenset[int],
    cache: KVCache,
) -> Iterator[int]:
    while True:
        # 1. Run what the cache does not hold: at first the prompt or its end, then the last token. Logits of the last
        #    position only.
        kept = cache.keep_prefix(tokens)
        logits = graph.forward(tokens[kept:], cache, bound, lasting=False)
        # 2. Pick, hand out, stop.
        token = sampler.pick(logits[-1], tokens)
        tokens.append(token)
        yield token
        if token in eos_ids or len(tokens) == full:
            return


def _stored(
    graph: Steps, prompt: Sequence[int], ids: Iterator[int], cache: KVCache, store: PrefixCache
) -> Iterator[int]:
    """`ids`, which run in `cache`, with `store` before the prompt, after it and at the end."""
    store.fill(cache, prompt)
    fresh = True
    for token in ids:
        if fresh:
            store.keep(cache, lambda: graph.content(cache))
            fresh = False
        try:
            yield token
        except GeneratorExit:  # stopped early; after a run that failed nothing is kept
            store.keep(cache, lambda: graph.content(cache))
            raise
    store.keep(cache, lambda: graph.content(cache))

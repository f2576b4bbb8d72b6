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
        copy: bool = True,
    ) -> NDArray[np.float32]:
        """Logits [1 or len(tokens), vocab] of `tokens` after what is in `cache`; `copy`: the caller's own."""

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
    prefix_cache: PrefixCache | None = None,
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
        prefix_cache: without a `cache`, where the prompt finds what was run before. What is run here is put into it
            after the prompt and at the end.

    Raises:
        RequestError: an empty prompt, one that leaves no room for a token or cannot follow the patch's KV prefix, or
            a bad `max_new_tokens`.
        StaleCacheError: `cache` was made under another patch.
    """
    if cache is not None:
        cache.require_key(bound.key)  # before anything in it is given up
        prefix_cache = None
    full = check_request(graph.folder, prompt, bound, max_new_tokens)
    if cache is None:
        cache = graph.new_cache(bound)
    ids = _loop(graph, list(prompt), bound, Sampler(sampling), full, eos_ids, cache)
    return ids if prefix_cache is None else _stored(graph, prompt, ids, cache, prefix_cache)


def prefill(graph: Steps, prompt: Sequence[int], bound: BoundPatch, prefix_cache: PrefixCache) -> None:
    """Run a prompt for what others share with it, and put its keys and values into `prefix_cache`.

    Raises:
        RequestError: the prompt cannot be served, or the prefix_cache cannot hold it.
    """
    check_request(graph.folder, prompt, bound, 1)
    cache = graph.new_cache(bound)
    prefix_cache.fill(cache, prompt)
    graph.forward(prompt[len(cache) :], cache, bound)
    if not prefix_cache.keep(cache, lambda: graph.content(cache)):
        raise RequestError(
            "the prefix cache cannot hold this prompt",
            field="prefix_cache_bytes",
            got=prefix_cache.budget,
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
        logits = graph.forward(tokens[kept:], cache, bound, copy=False)
        # 2. Pick, hand out, stop.
        token = sampler.pick(logits[-1], tokens)
        tokens.append(token)
        yield token
        if token in eos_ids or len(tokens) == full:
            return


def _stored(
    graph: Steps, prompt: Sequence[int], ids: Iterator[int], cache: KVCache, prefix_cache: PrefixCache
) -> Iterator[int]:
    """`ids`, which run in `cache`, with `prefix_cache` before the prompt, after it and at the end."""
    prefix_cache.fill(cache, prompt)
    fresh = True
    for token in ids:
        if fresh:
            prefix_cache.keep(cache, lambda: graph.content(cache))
            fresh = False
        try:
            yield token
        except GeneratorExit:  # stopped early; after a run that failed nothing is kept
            prefix_cache.keep(cache, lambda: graph.content(cache))
            raise
    prefix_cache.keep(cache, lambda: graph.content(cache))

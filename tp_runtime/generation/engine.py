"""The generation loop, on token ids.

The engine does not handle text, files, names of patches or devices. It gets caches and forward steps from a graph, and
the next id from a sampler. The tests run it with a fake graph.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError, require_positive
from ..session import BoundPatch, KVCache, ModelFolder, Use
from .prefix_cache import PrefixCache
from .prefix_entry import Content
from .sampler import Sampler


class Steps(Protocol):
    """The methods of a graph that the engine uses; see session.Graph."""

    folder: ModelFolder

    def new_cache(self, bound: BoundPatch) -> KVCache:
        """Return an empty cache for runs under `bound`."""

    def require_cache(self, cache: KVCache, bound: BoundPatch) -> None:
        """Raise unless this graph made `cache`, for runs under `bound`; see Graph.require_cache."""

    def forward(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        bound: BoundPatch,
        *,
        all_logits: bool = False,
        copy: bool = True,
        held: Use | None = None,
    ) -> NDArray[np.float32]:
        """Run `tokens` after the tokens in `cache` and return logits [1 or len(tokens), vocab]; see Graph.forward."""

    def content(self, cache: KVCache) -> Content:
        """Return the keys and values that `cache` holds."""


def generate(
    graph: Steps,
    prompt: Sequence[int],
    bound: BoundPatch,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    cache: KVCache | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Generator[int]:
    """Yield the ids of a completion, including the end-of-sequence id if it is reached.

    The prompt is run when the first id is requested. The loop ends at an id of `eos_ids`, after `max_new_tokens`, or
    when prompt and completion fill the context window.

    Args:
        graph: the graph that runs the steps.
        prompt: the ids so far, at least one.
        bound: the patch for every step of this completion.
        sampler: picks the ids of this completion, and of no other.
        max_new_tokens: the largest number of new tokens, at least 1.
        eos_ids: the ids that end a completion.
        cache: the cache of an earlier completion under the same patch. The ids that it shares with `prompt` are not run
            again. Afterwards it holds everything that was run here, so that a conversation can continue from it. From
            the first id to the end of the completion, or until it is closed, no other request can use the cache.
        prefix_cache: the store of earlier prompts' keys and values, which the prompt starts from; it is ignored if
            `cache` is passed. This completion's keys and values are stored in it after the prompt and at the end.

    Raises:
        RequestError: the prompt is empty, leaves no room for a token, or cannot follow the patch's KV prefix, or
            `max_new_tokens` is not a positive integer, or a bias is on an id outside the vocabulary.
        StaleCacheError: `cache` was made under another patch or by another graph.
        BusyError: another request is using `cache`. If it begins after this call, the first id raises it.
    """
    if cache is not None:
        graph.require_cache(cache, bound)  # this must come before anything in the cache is dropped
        cache.require_free()
        prefix_cache = None
    token_limit = check_request(graph.folder, prompt, bound, max_new_tokens)
    sampler.require_vocabulary(graph.folder.vocab_size)
    if cache is None:
        cache = graph.new_cache(bound)
    ids = _loop(graph, list(prompt), bound, sampler, token_limit, eos_ids, cache)
    return ids if prefix_cache is None else _stored(graph, prompt, ids, cache, prefix_cache)


def prefill(graph: Steps, prompt: Sequence[int], bound: BoundPatch, prefix_cache: PrefixCache) -> None:
    """Run a prompt and store its keys and values in `prefix_cache`, for prompts that start with the same ids.

    Raises:
        RequestError: the prompt cannot be served, or `prefix_cache` cannot hold it.
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
    """Check that a prompt can be served under a patch.

    Returns:
        The number of tokens, prompt included, at which the sequence ends.

    Raises:
        RequestError: `generate` would refuse the request.
    """
    require_positive("max_new_tokens", max_new_tokens)
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


def _loop(
    graph: Steps,
    tokens: list[int],
    bound: BoundPatch,
    sampler: Sampler,
    token_limit: int,
    eos_ids: frozenset[int],
    cache: KVCache,
) -> Generator[int]:
    prompt_tokens = len(tokens)
    held = Use(cache.uses)
    try:
        try:
            cache.take(held)
            while True:
                # 1. Run the ids that the cache does not hold: in the first round the prompt or its end, then the last
                #    token. Only the logits of the last position are needed.
                kept = cache.keep_prefix(tokens, held)
                logits = graph.forward(tokens[kept:], cache, bound, copy=False, held=held)
                # 2. Pick the next token, yield it, and stop if the completion has ended.
                token = sampler.pick(logits[-1], tokens, len(tokens) - prompt_tokens)
                tokens.append(token)
                yield token
                if token in eos_ids or len(tokens) == token_limit:
                    return
        finally:
            held.end()
    finally:
        held.end()  # an interrupt may arrive at the first one


def _stored(
    graph: Steps, prompt: Sequence[int], ids: Generator[int], cache: KVCache, prefix_cache: PrefixCache
) -> Generator[int]:
    """Yield `ids`, which run in `cache`.

    `prefix_cache` fills `cache` before the prompt is run, and stores its contents after the prompt and at the end.
    """
    prefix_cache.fill(cache, prompt)
    fresh = True
    with closing(ids):
        for token in ids:
            if fresh:
                prefix_cache.offer(cache, lambda: graph.content(cache))
                fresh = False
            try:
                yield token
            except GeneratorExit:  # the caller stopped early; after a run that failed nothing is stored
                prefix_cache.offer(cache, lambda: graph.content(cache))
                raise
    prefix_cache.offer(cache, lambda: graph.content(cache))

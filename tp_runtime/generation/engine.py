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
from ..session import BoundPatch, KVCache, Logits, ModelFolder, Use
from .lookup import Drafter, LookupStats, check_lookup, cost_of
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
        last: int = 1,
        held: Use | None = None,
    ) -> NDArray[np.float32]:
        """Run `tokens` after the tokens in `cache` and return logits [at most `last`, vocab]; see Graph.forward."""

    def forward_best(
        self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, *, best: int, last: int, held: Use
    ) -> Logits:
        """Run `tokens` and return what a pick from the `best` largest logits needs; see Graph.forward_best."""

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
    lookup: int = 0,
    stats: LookupStats | None = None,
) -> Generator[int]:
    """Yield the ids of a completion, including the end-of-sequence id if it is reached.

    The prompt is run when the first id is requested. The loop ends at an id of `eos_ids`, after `max_new_tokens`, or
    when prompt and completion fill the context window.

    Ids that the sampler's constraint forces go through the model in one run, together with the id that they follow.

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
        lookup: the largest number of ids that are drafted from prompt and completion and verified in one run; see
            lookup.py. With 0 nothing is drafted. The ids are the same with any number, apart from rounding.
        stats: counts the runs and the drafts of this completion.

    Raises:
        RequestError: the prompt is empty, leaves no room for a token, or cannot follow the patch's KV prefix,
            `max_new_tokens` is not a positive integer, `lookup` is not a whole number from 0 to 64, or a bias is on an
            id outside the vocabulary.
        StaleCacheError: `cache` was made under another patch or by another graph.
        BusyError: another request is using `cache`. If it begins after this call, the first id raises it.
    """
    check_lookup(lookup)
    if cache is not None:
        graph.require_cache(cache, bound)  # this must come before anything in the cache is dropped
        cache.require_free()
        prefix_cache = None
    token_limit = check_request(graph.folder, prompt, bound, max_new_tokens)
    sampler.require_vocabulary(graph.folder.vocab_size)
    if cache is None:
        cache = graph.new_cache(bound)
    drafter = Drafter(lookup, cost_of(graph.folder.precision)) if lookup else None
    completion = _Completion(graph, list(prompt), bound, sampler, token_limit, eos_ids, drafter, stats or LookupStats())
    ids = _held(completion, cache)
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


class _Completion:
    """One completion: its ids so far, and how it gets the next ones. The arguments are those of `generate`.

    Attributes:
        tokens: the ids of the prompt and of the completion so far.
    """

    def __init__(
        self,
        graph: Steps,
        tokens: list[int],
        bound: BoundPatch,
        sampler: Sampler,
        token_limit: int,
        eos_ids: frozenset[int],
        drafter: Drafter | None,
        stats: LookupStats,
    ) -> None:
        self.tokens = tokens
        self._graph, self._bound, self._sampler = graph, bound, sampler
        self._token_limit, self._eos_ids = token_limit, eos_ids
        self._drafter, self._stats = drafter, stats
        self._prompt_tokens = len(tokens)

    def ids(self, cache: KVCache, held: Use) -> Generator[int]:
        """Yield the ids. They run in `cache`, which the use `held` holds."""
        tokens, prompt_tokens, picks, stats = self.tokens, self._prompt_tokens, self._sampler, self._stats
        constrained = picks.constraint is not None
        best = picks.best
        copied = 0  # ids of the draft that are copies; forced ids are no guess
        # The first forced ids are verified like a draft, so that they run together with the prompt.
        draft = self._forced() if constrained else []
        kept = cache.keep_prefix(tokens, held)
        while True:
            # 1. Run the ids that the cache does not hold, in the first round the prompt or its end, and the draft
            #    behind them. Only the logits of the last of these ids and of the draft are needed.
            run = [*tokens[kept:], *draft] if draft else tokens[kept:]
            logits = self._graph.forward_best(run, cache, self._bound, best=best, last=len(draft) + 1, held=held)
            stats.runs += 1
            stats.drafted += copied
            # 2. Pick the next ids in order, as long as the pick is what the draft says; the pick after that is new.
            for at in range(len(draft) + 1):
                drafted = draft[at] if at < len(draft) else None
                token = picks.pick(logits[at], tokens, len(tokens) - prompt_tokens)
                tokens.append(token)
                if token != drafted:
                    del cache.tokens[len(tokens) - 1 :]  # the ids of the draft behind the one that was refused
                elif copied:
                    stats.accepted += 1
                yield token
                if self._ends(token):
                    return
                if token != drafted:
                    break
            kept = len(cache)  # while this use holds the cache, it holds the first of these ids and no others
            # 3. Add the ids that must come next. Without their log-probabilities they need no pick, so they wait for
            #    the next run.
            draft = self._forced() if constrained else []
            if draft and not picks.records:
                for token in draft:
                    tokens.append(token)
                    yield token
                    if self._ends(token):
                        return
                draft = []
            # 4. Draft.
            copied = 0
            if self._drafter is not None and not draft:
                draft = self._drafter.draft(tokens, self._token_limit - len(tokens) - 1)
                copied = len(draft)

    def _ends(self, token: int) -> bool:
        return token in self._eos_ids or len(self.tokens) == self._token_limit

    def _forced(self) -> list[int]:
        """Return the ids that the constraint says must come next, as many as there is room for."""
        constraint = self._sampler.constraint
        assert constraint is not None
        constraint.follow(self.tokens[self._prompt_tokens :])
        return constraint.forced()[: self._token_limit - len(self.tokens)]


def _held(completion: _Completion, cache: KVCache) -> Generator[int]:
    """Yield the ids of a completion, which holds `cache` from the first id to the end."""
    held = Use(cache.uses)
    try:
        try:
            cache.take(held)
            try:
                yield from completion.ids(cache, held)
            finally:
                # A draft may go on behind the end of the completion, and the last id of a completion is never run.
                del cache.tokens[len(completion.tokens) - 1 :]
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
                ids.close()  # this drops the ids of a draft from the cache
                prefix_cache.offer(cache, lambda: graph.content(cache))
                raise
    prefix_cache.offer(cache, lambda: graph.content(cache))

"""One sequence of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..session import BoundPatch, KVCache, Use
from .sampler import Sampler


@dataclass(eq=False)
class Row:
    """One sequence of a batch. Its `tokens` say how far it is; everything else that counts ids follows them.

    Attributes:
        tokens: the ids of the prompt and of the completion so far; the last id has not been run yet.
        prompt_tokens: the number of ids of the prompt.
        bound: the patch that the sequence runs under.
        token_limit: the number of ids, prompt included, at which the sequence ends.
        eos_ids: the ids that end the sequence.
        sampler: the sampler that picks the sequence's ids.
        cache: the KV cache of the ids that have been run.
        held: the row's use of the cache, which lasts as long as the row.
        started: whether a part of the prompt has been run or looked up in the prefix cache.
        finish_reason: "eos", "length", "left" or "error" after the sequence has ended; None before.
        error: the exception that stopped the prompt's run or the choice of a token, if the reason is "error"; otherwise
            None.
    """

    tokens: list[int]
    prompt_tokens: int
    bound: BoundPatch
    token_limit: int
    eos_ids: frozenset[int]
    sampler: Sampler
    cache: KVCache
    held: Use
    started: bool = field(default=False, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)

    def fail(self, error: Exception) -> None:
        """End the sequence with an error."""
        self.error, self.finish_reason = error, "error"

    def follow(self) -> None:
        """Enter the ids that the batch's steps have run into `cache`: all ids but the last one.

        An id is appended to `tokens` after the run that wrote the keys and values of the id before it.
        """
        held = self.cache.tokens
        held.extend(self.tokens[len(held) : -1])

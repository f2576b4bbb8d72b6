"""This module picks the next token of each request from logits.

The code uses only numpy. For a given seed the result is deterministic, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..session import BestLogits, Logits
from .constraint import Constraint, masked
from .logprobs import TokenLogprobs, WantedLogprobs, processed_logprobs, raw_logprobs
from .sampling import Sampling
from .scores import adjusted, candidates, largest

_SECOND = 2**64  # from this number on are the draws of picks that a constraint made necessary


class Sampler:
    """Draws tokens for one completion and holds its random state, its constraint and its log-probabilities.

    The draws are numbered, and the same number always gives the same draw. So a step that failed after its draw can be
    tried again.

    With a constraint, the sampler first picks as if there were none, and picks again from the allowed tokens only if
    the constraint refuses the pick. Without top_k, top_p and min_p, the distribution is exactly that of the allowed
    tokens: for a token of probability p, with A the probability of all allowed tokens, p + (1 - A) p / A = p / A.

    Args:
        sampling: the settings of the request.
        eos_ids: the ids that `min_new_tokens` bans.
        constraint: what may come next; None allows every token.
        logprobs: what to record of each token's probability; None records nothing.

    Attributes:
        sampling: the settings of the request.
        constraint: what may come next.
        takes_largest: whether the next token is always the one with the largest logit, and nothing else is wanted.
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        constraint: Constraint | None = None,
        logprobs: WantedLogprobs | None = None,
    ) -> None:
        self.sampling = Sampling() if sampling is None else sampling
        self.constraint = constraint
        self._eos_ids, self._wanted = tuple(eos_ids), logprobs
        plain = self.sampling.temperature == 0 and not self.sampling.changes_logits
        self.takes_largest = plain and constraint is None and logprobs is None
        self._records: list[TokenLogprobs] = []
        # The generator is made for the first draw: greedy requests need none, and numpy imports its module then, which
        # would delay the first token of a process.
        self._random: np.random.Generator | None = None
        self._start: Any = None
        self._next: int | None = None  # the number of the draw that the generator makes next; None if that is unknown

    @property
    def best(self) -> int:
        """How many of the largest logits the next token depends on, with all that equal the last of them; 0 for all.

        With these alone, `pick` picks the same token.
        """
        if self.sampling.changes_logits or self.constraint is not None or self._wanted is not None:
            return 0
        return 1 if self.sampling.temperature == 0 else self.sampling.top_k

    @property
    def records(self) -> bool:
        """Whether the request wants log-probabilities."""
        return self._wanted is not None

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The records of the tokens picked so far, in order; empty unless the request wants them."""
        return tuple(self._records)

    def require_vocabulary(self, size: int) -> None:
        """Raise RequestError if there is a bias on an id outside a vocabulary of that size."""
        largest_id = max(self.sampling.logit_bias, default=0)
        if largest_id >= size:
            raise RequestError(
                "the id is outside the vocabulary", field="logit_bias", got=largest_id, wanted=f"0 to {size - 1}"
            )

    def pick(self, logits: NDArray[np.floating] | BestLogits, history: Sequence[int], draw: int) -> int:
        """Choose the next token. If several logits are the largest, greedy choice takes the lowest id.

        Args:
            logits: the logits [vocab]; they are not changed. -inf marks a token that cannot be chosen, and NaN counts
                as -inf. Or the largest of them, at least `best`.
            history: the ids of the prompt and the completion so far.
            draw: the number of ids of the completion so far. It selects the random number.

        Returns:
            The id of the token.

        Raises:
            ModelFormatError: no logit is finite.
            RequestError: there is a repetition penalty, and an id in the history is outside the vocabulary.
        """
        if isinstance(logits, BestLogits):
            return int(logits.ids[self._choose(logits.values, draw)])
        if self.takes_largest:
            return largest(logits)
        scores = adjusted(logits, history, draw, self.sampling, self._eos_ids)
        if self.constraint is None:
            token = self._choose(scores, draw)
        else:
            token, scores = self._constrained(self.constraint, logits, scores, history, draw)
        if self._wanted is not None:
            del self._records[draw:]  # a step that failed after its pick is repeated
            self._records.append(self._record(self._wanted, logits, scores, token))
        return token

    def _constrained(
        self,
        constraint: Constraint,
        logits: NDArray[np.floating],
        scores: NDArray[np.floating],
        history: Sequence[int],
        draw: int,
    ) -> tuple[int, NDArray[np.floating]]:
        """Return a token that the constraint allows, and the logits that a record of it is made from.

        What is recorded does not change what is picked.
        """
        constraint.follow(history[len(history) - draw :])
        recorded = self._wanted is not None and self._wanted.mode == "processed"
        forced = constraint.forced()
        token = forced[0] if forced else self._choose(scores, draw)
        refused = not forced and not constraint.allows(token)
        if refused or recorded:
            allowed = constraint.allowed()
            masked_scores = masked(scores, allowed)
            if not np.isfinite(masked_scores).any():  # only the end may come, and min_new_tokens bans it: it comes
                free = replace(self.sampling, min_new_tokens=0)
                masked_scores = masked(adjusted(logits, history, draw, free), allowed)
            scores = masked_scores
            if refused:
                token = self._choose(scores, draw + _SECOND)
        return token, scores

    def _choose(self, scores: NDArray[np.floating], draw: int) -> int:
        if self.sampling.temperature == 0:
            return largest(scores)
        ids, probabilities = candidates(scores, self.sampling)
        cumulative = probabilities.cumsum()
        at = cumulative.searchsorted(self._uniform(draw) * cumulative[-1], side="right")
        return int(ids[min(at, len(ids) - 1)])  # the product above can round up to the sum

    def _record(
        self, wanted: WantedLogprobs, logits: NDArray[np.floating], scores: NDArray[np.floating], token: int
    ) -> TokenLogprobs:
        if wanted.mode == "raw":
            return raw_logprobs(logits, token, wanted.top)
        return processed_logprobs(scores, token, wanted.top, self.sampling)

    def _uniform(self, draw: int) -> float:
        """Return the random number of that draw, in [0, 1)."""
        known, self._next = self._next, None  # an interrupt below leaves it unknown how far the generator is
        if self._random is None:
            bits = np.random.PCG64(self.sampling.seed)
            self._start, self._random = bits.state, np.random.Generator(bits)
        if known != draw:
            bits = self._random.bit_generator  # type: ignore[assignment]
            bits.state = self._start
            bits.advance(draw)
        number = self._random.random()
        self._next = draw + 1
        return number


def pick_rows(
    samplers: Sequence[Sampler],
    logits: Logits,
    histories: Sequence[Sequence[int]],
    draws: Sequence[int],
) -> list[int | Exception]:
    """Pick the next token of every row with the row's own sampler; the results equal those of `Sampler.pick`.

    Args:
        samplers: the samplers of the rows.
        logits: the logits [rows, vocab], or the largest ones of each row; they are not changed.
        histories: for each row the ids of its prompt and its completion so far.
        draws: for each row the number of ids of its completion so far.

    Returns:
        For each row a token, or the error that the choice caused. One row that fails does not stop the others.
    """
    picked: list[int | Exception] = [-1] * len(samplers)
    plain = [row for row, sampler in enumerate(samplers) if sampler.takes_largest]
    if plain and not isinstance(logits, list):
        best = (logits if len(plain) == len(samplers) else logits[plain]).argmax(1)
        good_rows = np.isfinite(logits[plain, best])
        for row, token, good in zip(plain, best.tolist(), good_rows.tolist(), strict=True):
            if good:
                picked[row] = token
    for row, token in enumerate(picked):
        if token == -1:
            try:
                picked[row] = samplers[row].pick(logits[row], histories[row], draws[row])
            except Exception as error:  # whatever it is, it belongs to this row
                picked[row] = error
    return picked

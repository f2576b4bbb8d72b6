"""The state of one constrained completion: which ids may come next after the ids so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .vocabulary import Vocabulary

_FINISHED = ("NoExtension", "NoExtensionBias", "EndOfSentence")  # the reasons to stop that llguidance calls good
_LONGEST_RUN = 256  # forced ids at once: a grammar can force a million


class GrammarConstraint:
    """The constraint of one completion, which satisfies the protocol `Constraint` of the room `generation`.

    The matcher of llguidance never raises: after an error it says that only the end may come. That would pass a broken
    text off as a finished one, so every answer is checked.

    Args:
        matcher: an `LLMatcher` at its beginning, which belongs to this object alone.
        vocabulary: the ids of the model.
        field: the argument that the constraint came from, for errors.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary, field: str) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._field = field
        self._forced: list[int] | None = None  # what must come after the ids; None if that has not been asked
        self._ids: list[int] = []  # the completion that the state stands after
        self._consumed = 0  # how many of them the matcher has: an id that ends a text which is over is not given to it

    def follow(self, completion: Sequence[int]) -> None:
        """Bring the state to the one after a completion: consume the new ids, and take back what is no longer there.

        Args:
            completion: all ids of the completion so far, without the prompt.

        Raises:
            RequestError: an id is not allowed at its place. The state is then the one after the ids before it.
        """
        ids = list(completion)
        if ids != self._ids:
            self._forced = None
        same = len(self._ids) if ids[: len(self._ids)] == self._ids else _common(ids, self._ids)
        self._take_back(same)
        for token in ids[same:]:
            if not self._over():
                if not 0 <= token < self._vocabulary.width or self._matcher.try_consume_tokens([token]) != 1:
                    self._check()
                    raise self._not_allowed(token)
                self._consumed += 1
            elif token not in self._vocabulary.eos_ids or len(self._ids) > self._consumed:
                raise self._not_allowed(token)
            self._ids.append(token)

    def allows(self, token: int) -> bool:
        """Return whether the completion may continue with this id. No mask is computed.

        Raises:
            RequestError: the constraint has become too complex.
        """
        if not 0 <= token < self._vocabulary.width:
            return False
        if self._over():
            return token in self._vocabulary.eos_ids and len(self._ids) == self._consumed
        allowed = self._matcher.validate_tokens([token]) == 1
        if not allowed:
            self._check()
        return allowed

    def allowed(self) -> NDArray[np.uint32]:
        """Return the ids that may come next as bits [ceil(vocab / 32)]: bit i % 32 of word i // 32 stands for id i.

        Where the next text is forced, the mask has one id of `forced`, and `allows` accepts other spellings too.

        Raises:
            RequestError: the constraint has become too complex, or no id of this vocabulary can go on.
        """
        over = self._over()
        bits = self._vocabulary.cut(self._matcher.compute_bitmask())
        if not over:
            self._check()
            if self._over() or not bits.any():  # the matcher found only now that nothing can come
                raise self._unfinished()
        return bits

    def forced(self) -> list[int]:
        """Return the ids that must come next, one after the other, as far as that is known; the list may be empty.

        Where the completion must end, it is one id that ends it.

        Raises:
            RequestError: the constraint has become too complex.
        """
        if self._forced is None:  # the loop and the sampler both ask after every id
            self._forced = self._compute_forced()
        return list(self._forced)

    def _compute_forced(self) -> list[int]:
        if self._over():
            return [self._vocabulary.eos_ids[0]] if len(self._ids) == self._consumed else []
        ids: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        run = ids[:_LONGEST_RUN]
        return run[: next((at for at, token in enumerate(run) if token >= self._vocabulary.width), len(run))]

    def _over(self) -> bool:
        """Return whether only an id that ends the completion may come, or nothing."""
        if not self._matcher.is_stopped():
            return False
        self._check()
        if self._matcher.stop_reason() not in _FINISHED:
            raise self._unfinished()
        return True

    def _take_back(self, kept: int) -> None:
        """Forget the ids after the first `kept`."""
        surplus = self._consumed - min(kept, self._consumed)
        if surplus:
            self._matcher.rollback(surplus)
            self._consumed -= surplus
        del self._ids[kept:]
        self._check()

    def _check(self) -> None:
        """Raise RequestError if the matcher has failed."""
        if self._matcher.is_error():
            lines = str(self._matcher.get_error()).strip().splitlines() or [""]
            if lines[0].startswith("NoExtension"):
                raise self._unfinished()
            raise RequestError(
                "the constraint has become too complex to follow",
                field=self._field,
                got=lines[0],
                wanted="a constraint that stays within the limits of the parser",
                fix="bound repetitions and lengths, and name fewer optional properties",
            )

    def _unfinished(self) -> RequestError:
        return RequestError(
            "no id of the vocabulary can continue the text",
            field=self._field,
            got=f"a text of {len(self._ids)} ids that is not finished",
            wanted="a constraint that has an end and that the model's tokens can spell",
        )

    def _not_allowed(self, token: int) -> RequestError:
        return RequestError(
            "the constraint does not allow an id of the completion",
            field=self._field,
            got=f"id {token} after {len(self._ids)} ids",
            wanted="an id that `allows` accepts",
        )


def _common(left: list[int], right: list[int]) -> int:
    """Return the number of ids at the beginning that two lists share."""
    pairs = zip(left, right, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))

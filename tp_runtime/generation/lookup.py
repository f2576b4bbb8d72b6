"""Prompt-lookup decoding: drafts of the ids that come next, copied from the request's own text.

Where the last ids have occurred before, in the prompt or in the completion, what followed them there may follow again.
Such a draft costs no model: it is verified in the run that computes the next id anyway. Text that edits, extracts or
quotes is copied in long stretches, and in other text a draft is seldom worth its run.

Whether it is worth it can be known without trying. At every place with an earlier occurrence, the next id shows whether
the copy would have been right, drafted or not. From these observations a `Drafter` estimates how far a copy will be
right, and drafts as many ids as make the expected time per id the shortest. Where nothing is copied, it soon drafts
nothing, and goes on observing. Besides, drafts may never cost more than a small share of the time without them: each
completion has a balance of what its drafts saved and cost, in runs of one id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError, shown
from ..patch import FLOAT_PRECISIONS

_MOST = 64  # ids of a draft
_GRAMS = (3, 2)  # the numbers of ids by which an earlier occurrence is found; the longest one is looked up first
_LONGEST_MATCH = 16  # ids; longer matches are as sure as this one
# The classes of matches by the number of ids that agree, and how often the next id agrees too before anything is known
# of the request. These are averages over the tasks of benchmarks/lookup.py on both models.
_CLASSES = (2, 3, 4, 6, 9, 16)
_PRIORS = (0.35, 0.6, 0.75, 0.8, 0.9, 0.97)
_PRIOR_WEIGHT = 4.0  # observations that a prior counts for
_DECAY = 0.95  # of the weight of an observation with each one that follows
_WORTH = 1.02  # a draft must make the expected time per id shorter by this factor
_CREDIT = 1.0  # how much longer drafts may make a completion at first, in runs of one id
_ALLOWED = 0.02  # and for each id

_CLASS_OF = tuple(max((i for i, least in enumerate(_CLASSES) if least <= match), default=0) for match in range(17))


@dataclass
class LookupStats:
    """What became of the drafts of one completion.

    Attributes:
        runs: the number of runs of the model, the prompt's included.
        drafted: the number of ids that were drafted.
        accepted: the number of these that became part of the completion.
    """

    runs: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class RunCost:
    """How much longer a run takes with each id that is added to it, as a share of the time of a run of one id.

    A run of one id waits for the memory that holds the weights; a few more ids are computed meanwhile.

    Attributes:
        first: the share that the first added id adds.
        more: the share that each further one adds, as long as reading the weights takes longer than computing.
        each: the share that each one adds, from the first on, where computing takes longer.
    """

    first: float
    more: float
    each: float

    def added(self, ids: int) -> float:
        """Return the share that `ids` more ids add to a run of one id; `ids` is at least 1."""
        return max(self.first + self.more * (ids - 1), self.each * ids)


# From `python -m benchmarks.lookup MODEL_DIR --cost`, on one thread of a CPU.
FLOAT_COST = RunCost(0.16, 0.03, 0.08)
QUANTISED_COST = RunCost(0.24, 0.24, 0.24)


def check_lookup(lookup: object) -> None:
    """Raise RequestError unless the value is a number of ids that a request may draft at once."""
    if isinstance(lookup, bool) or not isinstance(lookup, int) or not 0 <= lookup <= _MOST:
        raise RequestError(
            "the value is not a number of tokens",
            field="lookup",
            got=shown(lookup),
            wanted=f"a whole number from 0 to {_MOST}",
        )


def cost_of(precision: str) -> RunCost:
    """Return how much longer a run takes with each id in a folder of that precision."""
    return FLOAT_COST if precision in FLOAT_PRECISIONS else QUANTISED_COST


class Drafter:
    """Drafts for one completion.

    Args:
        most: the largest number of ids of a draft.
        cost: how much longer a run takes with a draft.
    """

    def __init__(self, most: int, cost: RunCost) -> None:
        self._most = most
        self._added = [0.0, *(cost.added(ids) for ids in range(1, most + 1))]
        self._after: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in _GRAMS)  # n-gram -> the place after it
        self._read = 0  # ids that are in the index
        self._source: int | None = None  # the place whose id would be copied next; None if there is no match
        self._match = 0  # the number of ids before it that agree with the last ids, as far as they were counted
        self._hits = [prior * _PRIOR_WEIGHT for prior in _PRIORS]
        self._seen = [_PRIOR_WEIGHT for _ in _PRIORS]
        self._draft: list[int] = []  # the last draft
        self._balance = _CREDIT  # what drafts have saved and may cost, in runs of one id

    def draft(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return ids that are likely to come next; often none.

        Args:
            tokens: the ids of prompt and completion. They begin with those of the last call: what was read of them is
                not read again.
            room: the largest number of ids that can be used.
        """
        self._settle(tokens)
        self._read_on(tokens)
        self._draft = []
        if self._source is not None:
            source, period = self._source, len(tokens) - self._source
            # Text that repeats itself goes on repeating: the copy then begins again at its source.
            self._draft = [tokens[source + i % period] for i in range(self._length(min(room, self._most)))]
        return self._draft

    def _settle(self, tokens: Sequence[int]) -> None:
        """Add to the balance what the last draft saved, and what the new ids allow; take off what the draft cost."""
        new = tokens[self._read :] if self._read else []
        pairs = list(zip(self._draft, new, strict=False))
        right = next((place for place, (drafted, kept) in enumerate(pairs) if drafted != kept), len(pairs))
        self._balance += right - self._added[len(self._draft)] + _ALLOWED * len(new)

    def _length(self, most: int) -> int:
        """Return the number of ids, at most `most`, for which the expected time per id is the shortest."""
        best, length, right, expected = _WORTH, 0, 1.0, 1.0
        for ids in range(1, most + 1):
            kind = _CLASS_OF[min(self._match + ids - 1, _LONGEST_MATCH)]
            right *= self._hits[kind] / self._seen[kind]
            expected += right
            if self._added[ids] <= self._balance and expected > best * (1 + self._added[ids]):
                best, length = expected / (1 + self._added[ids]), ids
        return length

    def _read_on(self, tokens: Sequence[int]) -> None:
        """Read the ids that were not read before: observe whether a copy was right, and index them."""
        first = self._read == 0
        for end in range(self._read + 1, len(tokens) + 1):
            if self._source is not None:
                right = tokens[self._source] == tokens[end - 1]
                self._observe(right)
                self._source, self._match = (self._source + 1, self._match + 1) if right else (None, 0)
            for size, after in zip(_GRAMS, self._after, strict=True):
                if end >= size:
                    gram = tuple(tokens[end - size : end])
                    if self._source is None and (not first or end == len(tokens)) and gram in after:
                        self._follow(tokens, after[gram], end, size)
                    after[gram] = end
        self._read = len(tokens)

    def _observe(self, right: bool) -> None:
        kind = _CLASS_OF[min(self._match, _LONGEST_MATCH)]
        self._seen[kind] = self._seen[kind] * _DECAY + 1
        self._hits[kind] = self._hits[kind] * _DECAY + right

    def _follow(self, tokens: Sequence[int], source: int, end: int, match: int) -> None:
        while match < min(_LONGEST_MATCH, source) and tokens[source - match - 1] == tokens[end - match - 1]:
            match += 1
        self._source, self._match = source, match

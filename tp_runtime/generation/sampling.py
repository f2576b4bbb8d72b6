"""The next token from logits: the settings, checked once, and the draw.

Order and meaning of the settings are those of transformers' generate. Plain numpy; deterministic for a seed, whatever
else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFormatError, RequestError

_NUCLEUS = 256  # tokens looked at first for top_p: the nucleus of a trained model is rarely wider


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The default is greedy.

    Attributes:
        temperature: divides the logits; 0 takes the largest, and top_k, top_p, min_p, seed have no effect.
        top_k: keep the k largest, and their equals; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to this; in (0, 1], 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the first; in [0, 1), 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens already there;
            1 changes none.
        seed: makes the draws repeatable; None does not.

    Raises:
        RequestError: a value is out of range, named by its field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, accepts, wanted in _RULES:
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            # bool counts as an int in Python; here it is a mistake.
            if isinstance(value, bool) or not isinstance(value, kind) or not accepts(value):
                raise RequestError("not a sampling value", field=name, got=repr(value), wanted=wanted)


_RULES: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
    ("temperature", Real, lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    ("top_k", Integral, lambda x: x >= 0, "an integer, 0 or more"),
    ("top_p", Real, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    ("min_p", Real, lambda x: 0 <= x < 1, "a number, 0 or more, below 1"),
    ("repetition_penalty", Real, lambda x: 0 < x < math.inf, "a finite number above 0"),
    ("seed", Integral, lambda x: x >= 0, "an integer, 0 or more, or None"),
)


class Sampler:
    """Draws tokens for one request; holds that request's random state.

    Args:
        sampling: the settings.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    @property
    def takes_largest(self) -> bool:
        """Whether the next token is the largest logit's, whatever came before."""
        return self._sampling.temperature == 0 and self._sampling.repetition_penalty == 1

    def pick(self, logits: NDArray[np.floating], history: Sequence[int]) -> int:
        """Chooses the next token; in a tie for the largest, the lowest id.

        Args:
            logits: [vocab], not changed. -inf marks a token that cannot be chosen, and NaN is taken as that.
            history: ids of the prompt and the completion so far, for the repetition penalty.

        Raises:
            ModelFormatError: no logit is finite.
            RequestError: the penalty is on and an id in the history is outside the logits.
        """
        scores = _penalised(logits, history, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            best = int(scores.argmax())
            # argmax stops at a NaN or +inf if there is one, so this one look is enough.
            return best if np.isfinite(scores[best]) else int(_finite(scores).argmax())
        ids, probabilities = candidates(scores, self._sampling)
        cumulative = probabilities.cumsum()
        at = cumulative.searchsorted(self._random.random() * cumulative[-1], side="right")
        return int(ids[min(at, len(ids) - 1)])  # the product can round up to the sum


def pick_rows(
    samplers: Sequence[Sampler], logits: NDArray[np.floating], histories: Sequence[Sequence[int]]
) -> list[int | ModelFormatError]:
    """The next token of every row, each by its own sampler: what `Sampler.pick` gives for the row alone.

    Args:
        samplers: of the rows.
        logits: [rows, vocab], not changed.
        histories: ids of prompt and completion so far, of each row.

    Returns:
        For each row a token, or the error that its logits give: one broken row does not stop the others.
    """
    picked: list[int | ModelFormatError] = [-1] * len(samplers)
    plain = [row for row, sampler in enumerate(samplers) if sampler.takes_largest]
    if plain:
        best = (logits if len(plain) == len(samplers) else logits[plain]).argmax(1)
        finite = np.isfinite(logits[plain, best])
        for row, token, good in zip(plain, best.tolist(), finite.tolist(), strict=True):
            if good:
                picked[row] = token
    for row, token in enumerate(picked):
        if token == -1:
            try:
                picked[row] = samplers[row].pick(logits[row], histories[row])
            except ModelFormatError as error:
                picked[row] = error
    return picked


def candidates(logits: NDArray[np.floating], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that temperature, top_k, top_p and min_p leave, in this order, and their probabilities.

    Args:
        logits: [vocab], after the repetition penalty.
        sampling: settings with a temperature above 0.

    Returns:
        ids [kept] and probabilities [kept], which sum to 1; at least one.

    Raises:
        ModelFormatError: no logit is finite.
    """
    top = logits.max()
    if not np.isfinite(top):
        logits = _finite(logits)
        top = logits.max()
    # Relative to the largest before dividing: a tiny temperature then cannot overflow.
    scores = (logits.astype(np.float64) - float(top)) / float(sampling.temperature)
    ids = np.flatnonzero(scores > -np.inf)
    scores = scores[ids]
    if 0 < sampling.top_k < len(ids):
        kept = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
        ids, scores = ids[kept], scores[kept]
    weights = np.exp(scores)
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    # The largest weight is 1, so a weight is already the ratio to the first.
    kept = np.flatnonzero((weights >= sampling.min_p) & (weights > 0))
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _penalised(logits: NDArray[np.floating], history: Sequence[int], penalty: float) -> NDArray[np.floating]:
    if penalty == 1 or not len(history):
        return logits
    seen = np.asarray(history, dtype=np.int64)
    if seen.min() < 0 or seen.max() >= len(logits):
        raise RequestError(
            "token id outside the vocabulary",
            field="history",
            got=f"{seen.min()} to {seen.max()}",
            wanted=f"0 to {len(logits) - 1}",
            fix="use the tokenizer of this model",
        )
    # An id that comes twice is read twice from the old row and written the same value twice: penalised once.
    values = logits[seen]
    scores = logits.copy()
    scores[seen] = np.where(values < 0, values * penalty, values / penalty)
    return scores


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ascending indices of the fewest weights that sum to `top_p` of all; of equals, the lowest first."""
    goal = top_p * weights.sum()
    size = _NUCLEUS
    while True:
        # Sort only the largest: with their equals, so that the cut does not depend on how the partition fell.
        if size < len(weights):
            largest = np.flatnonzero(weights >= np.partition(weights, -size)[-size])
        else:
            largest = np.arange(len(weights))
        order = largest[np.argsort(-weights[largest], kind="stable")]
        before = weights[order].cumsum() - weights[order]  # the weight in front of each
        kept = order[before < goal]
        if len(kept) < len(order) or len(order) == len(weights):
            return np.sort(kept)
        size *= 8


def _finite(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """The row with NaN as -inf and +inf (an overflow) as the largest number; raises if nothing is finite."""
    if not np.isfinite(logits).any():
        raise ModelFormatError(
            "no logit is finite",
            field="logits",
            got=f"{np.isnan(logits).sum()} NaN of {logits.size}",
            wanted="at least one finite number",
            fix="use a graph of higher precision, or a weaker patch",
        )
    return np.nan_to_num(logits, nan=-np.inf, posinf=float(np.finfo(logits.dtype).max), neginf=-np.inf)

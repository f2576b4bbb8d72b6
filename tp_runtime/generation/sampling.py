"""This module picks the next token from logits: it checks the sampling settings once, and draws.

The order and the meaning of the settings are those of transformers' generate. The code uses only numpy. For a given
seed the result is deterministic, whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFormatError, RequestError, shown

_NUCLEUS = 256  # the number of tokens that top_p sorts first: the nucleus of a trained model is rarely larger


@dataclass(frozen=True)
class Sampling:
    """The settings for choosing the next token. The default is greedy.

    Attributes:
        temperature: the divisor of the logits. With 0 the largest logit wins, and top_k, top_p, min_p and seed have no
            effect.
        top_k: the number k of the largest logits to keep, together with logits equal to the k-th; 0 keeps all.
        top_p: the probability that the kept tokens reach together, with as few tokens as possible; in (0, 1], 1 keeps
            all.
        min_p: the smallest kept probability, as a fraction of the most likely token's; in [0, 1), 0 keeps all.
        repetition_penalty: the factor that divides the positive and multiplies the negative logits of tokens that occur
            in the prompt or the completion; 1 changes nothing.
        seed: the seed of the random draws, which makes them repeatable; with None they are not repeatable.

    Raises:
        RequestError: a value has a wrong type or is out of range; the error's field names the setting.
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
            # The rules are checked on the number that the choice computes with, because a fraction can round to 0.
            number = _number(value, kind)
            if number is None or not accepts(number):
                raise RequestError("the sampling value is not valid", field=name, got=shown(value), wanted=wanted)
            object.__setattr__(self, name, number)


_RULES: tuple[tuple[str, type[int] | type[float], Callable[[Any], bool], str], ...] = (
    ("temperature", float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    ("top_k", int, lambda x: x >= 0, "an integer, 0 or more"),
    ("top_p", float, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    ("min_p", float, lambda x: 0 <= x < 1, "a number, 0 or more, below 1"),
    ("repetition_penalty", float, lambda x: 0 < x < math.inf, "a finite number above 0"),
    ("seed", int, lambda x: x >= 0, "an integer, 0 or more, or None"),
)


def _number(value: object, kind: type[int] | type[float]) -> int | float | None:
    """Return a value as an int or a float; None if it is no such number, or too large for a float."""
    if isinstance(value, bool):  # a bool is an int in Python, but as a setting it is a mistake
        return None
    try:
        if kind is int:
            return int(value) if isinstance(value, Integral) else None
        return float(value) if isinstance(value, Real) else None
    except MemoryError:
        raise
    except Exception:  # a number of another package converts itself, and may raise anything
        return None


class Sampler:
    """Draws tokens for one request and holds that request's random state.

    The draws are numbered, and the same number always gives the same draw. So a step that failed after its draw can be
    tried again.

    Args:
        sampling: the settings of the request.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._bits = np.random.PCG64(sampling.seed)
        self._random = np.random.Generator(self._bits)
        self._start = self._bits.state
        self._next: int | None = 0  # the number of the draw that the generator makes next; None if that is unknown

    @property
    def takes_largest(self) -> bool:
        """Whether the next token is always the one with the largest logit, whatever came before."""
        return self._sampling.temperature == 0 and self._sampling.repetition_penalty == 1

    def pick(self, logits: NDArray[np.floating], history: Sequence[int], draw: int) -> int:
        """Choose the next token. If several logits are the largest, greedy choice takes the lowest id.

        Args:
            logits: the logits [vocab]; they are not changed. -inf marks a token that cannot be chosen, and NaN counts
                as -inf.
            history: the ids of the prompt and the completion so far, for the repetition penalty.
            draw: the number of ids that were picked before this one. It selects the random number.

        Returns:
            The id of the token.

        Raises:
            ModelFormatError: no logit is finite.
            RequestError: there is a repetition penalty, and an id in the history is outside the vocabulary.
        """
        scores = _penalised(logits, history, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            best = int(scores.argmax())
            # If there is a NaN or +inf, argmax returns its index, so it is enough to check this one score.
            return best if np.isfinite(scores[best]) else int(_finite(scores).argmax())
        ids, probabilities = candidates(scores, self._sampling)
        cumulative = probabilities.cumsum()
        at = cumulative.searchsorted(self._uniform(draw) * cumulative[-1], side="right")
        return int(ids[min(at, len(ids) - 1)])  # the product above can round up to the sum

    def _uniform(self, draw: int) -> float:
        """Return the random number of that draw, in [0, 1)."""
        known, self._next = self._next, None  # an interrupt below leaves it unknown how far the generator is
        if known != draw:
            self._bits.state = self._start
            self._bits.advance(draw)
        number = self._random.random()
        self._next = draw + 1
        return number


def pick_rows(
    samplers: Sequence[Sampler],
    logits: NDArray[np.floating],
    histories: Sequence[Sequence[int]],
    draws: Sequence[int],
) -> list[int | Exception]:
    """Pick the next token of every row with the row's own sampler; the results equal those of `Sampler.pick`.

    Args:
        samplers: the samplers of the rows.
        logits: the logits [rows, vocab]; they are not changed.
        histories: for each row the ids of its prompt and its completion so far.
        draws: for each row the number of ids of its completion so far.

    Returns:
        For each row a token, or the error that the choice caused. One row that fails does not stop the others.
    """
    picked: list[int | Exception] = [-1] * len(samplers)
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
                picked[row] = samplers[row].pick(logits[row], histories[row], draws[row])
            except Exception as error:  # whatever it is, it belongs to this row
                picked[row] = error
    return picked


def candidates(logits: NDArray[np.floating], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the tokens that remain after temperature, top_k, top_p and min_p, in this order, with probabilities.

    Args:
        logits: the logits [vocab], after the repetition penalty.
        sampling: the settings, with a temperature above 0.

    Returns:
        The ids [kept] and their probabilities [kept], which sum to 1; at least one token is kept.

    Raises:
        ModelFormatError: no logit is finite.
    """
    top = logits.max()
    if not np.isfinite(top):
        logits = _finite(logits)
        top = logits.max()
    # The largest logit is subtracted before the division, so that a tiny temperature cannot overflow.
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
    # The largest weight is 1, so each weight is already the ratio to the most likely token.
    kept = np.flatnonzero((weights >= sampling.min_p) & (weights > 0))
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _penalised(logits: NDArray[np.floating], history: Sequence[int], penalty: float) -> NDArray[np.floating]:
    if penalty == 1 or not len(history):
        return logits
    seen = np.asarray(history, dtype=np.int64)
    if seen.min() < 0 or seen.max() >= len(logits):
        raise RequestError(
            "a token id is outside the vocabulary",
            field="history",
            got=f"{seen.min()} to {seen.max()}",
            wanted=f"0 to {len(logits) - 1}",
            fix="use the tokenizer of this model",
        )
    # An id that occurs twice is penalised once: both reads come from the old row, and both writes are the same value.
    values = logits[seen]
    scores = logits.copy()
    scores[seen] = np.where(values < 0, values * penalty, values / penalty)
    return scores


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Return ascending indices of the fewest weights that sum to `top_p` of all; ties prefer the lowest index."""
    goal = top_p * weights.sum()
    size = _NUCLEUS
    while True:
        # Sort only the largest weights, with all ties at the boundary: then the order of the partition has no effect.
        if size < len(weights):
            largest = np.flatnonzero(weights >= np.partition(weights, -size)[-size])
        else:
            largest = np.arange(len(weights))
        order = largest[np.argsort(-weights[largest], kind="stable")]
        before = weights[order].cumsum() - weights[order]  # for each weight the sum of the weights before it
        kept = order[before < goal]
        if len(kept) < len(order) or len(order) == len(weights):
            return np.sort(kept)
        size *= 8


def _finite(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the row with -inf for NaN and the largest number for +inf (an overflow); raise if nothing is finite."""
    if not np.isfinite(logits).any():
        raise ModelFormatError(
            "no logit is finite",
            field="logits",
            got=f"{np.isnan(logits).sum()} NaN of {logits.size}",
            wanted="at least one finite number",
            fix="use a graph of higher precision, or a weaker patch",
        )
    return np.nan_to_num(logits, nan=-np.inf, posinf=float(np.finfo(logits.dtype).max), neginf=-np.inf)

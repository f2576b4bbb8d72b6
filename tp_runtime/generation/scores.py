"""From the logits of one position to the tokens that may be picked, in numpy: penalties, top_k, top_p and min_p."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFormatError, RequestError
from .sampling import Sampling

_NUCLEUS = 256  # the number of tokens that top_p sorts first: the nucleus of a trained model is rarely larger


def adjusted(
    logits: NDArray[np.floating],
    history: Sequence[int],
    completion_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int] = (),
) -> NDArray[np.floating]:
    """Return the logits [vocab] after the bias, the penalties and the smallest length; `logits` is not changed.

    Args:
        logits: the model's logits [vocab].
        history: the ids of the prompt and the completion so far.
        completion_tokens: the number of the last ids of `history` that belong to the completion.
        sampling: the settings.
        eos_ids: the ids that `min_new_tokens` bans.

    Raises:
        RequestError: an id of the history or of the bias is outside the vocabulary.
    """
    if not sampling.changes_logits:
        return logits
    scores = logits.copy()
    if sampling.logit_bias:
        ids = _in_vocabulary(list(sampling.logit_bias), len(logits), "logit_bias")
        scores[ids] += np.fromiter(sampling.logit_bias.values(), np.float64).astype(scores.dtype)
    if sampling.repetition_penalty != 1 and len(history):
        seen = _in_vocabulary(history, len(logits), "history")
        # An id that occurs twice is penalised once: both reads come from the old row, both writes are the same value.
        values, penalty = scores[seen], sampling.repetition_penalty
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
    if completion_tokens and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, times = np.unique(_in_vocabulary(history[-completion_tokens:], len(logits), "history"), return_counts=True)
        lowered = sampling.frequency_penalty * times + sampling.presence_penalty
        scores[ids] -= lowered.astype(scores.dtype)
    if completion_tokens < sampling.min_new_tokens:
        scores[[token for token in eos_ids if token < len(logits)]] = -np.inf
    return scores


def candidates(logits: NDArray[np.floating], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the tokens that remain after temperature, top_k, top_p and min_p, in this order, with probabilities.

    Args:
        logits: the logits [vocab], after the penalties.
        sampling: the settings, with a temperature above 0.

    Returns:
        The ids [kept] and their probabilities [kept], which sum to 1; at least one token is kept.

    Raises:
        ModelFormatError: no logit is finite.
    """
    top = logits.max()
    if not np.isfinite(top):
        logits = finite(logits)
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


def largest(logits: NDArray[np.floating]) -> int:
    """Return the id of the largest logit, the lowest id if several are the largest.

    Raises:
        ModelFormatError: no logit is finite.
    """
    best = int(logits.argmax())
    # If there is a NaN or +inf, argmax returns its index, so it is enough to check this one logit. It is compared as a
    # number of Python, because a decode step waits several times as long for numpy's machinery.
    return best if -math.inf < logits.item(best) < math.inf else int(finite(logits).argmax())


def finite(logits: NDArray[np.floating]) -> NDArray[np.floating]:
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


def _in_vocabulary(ids: Sequence[int], vocab: int, field: str) -> NDArray[np.int64]:
    found = np.asarray(ids, dtype=np.int64)
    if found.min() < 0 or found.max() >= vocab:
        raise RequestError(
            "a token id is outside the vocabulary",
            field=field,
            got=f"{found.min()} to {found.max()}",
            wanted=f"0 to {vocab - 1}",
            fix="use the tokenizer of this model",
        )
    return found


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Return ascending indices of the fewest weights that sum to `top_p` of all; ties prefer the lowest index."""
    goal = top_p * weights.sum()
    size = _NUCLEUS
    while True:
        # Sort only the largest weights, with all ties at the boundary: then the order of the partition has no effect.
        if size < len(weights):
            most = np.flatnonzero(weights >= np.partition(weights, -size)[-size])
        else:
            most = np.arange(len(weights))
        order = most[np.argsort(-weights[most], kind="stable")]
        before = weights[order].cumsum() - weights[order]  # for each weight the sum of the weights before it
        kept = order[before < goal]
        if len(kept) < len(order) or len(order) == len(weights):
            return np.sort(kept)
        size *= 8

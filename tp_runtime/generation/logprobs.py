"""Log-probabilities of picked tokens and of the likeliest ones, before or after the sampling settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError, shown
from .sampling import Sampling
from .scores import candidates, finite

LogprobsMode = Literal["raw", "processed"]


@dataclass(frozen=True)
class WantedLogprobs:
    """What a request wants to know of each token's probability.

    Attributes:
        top: the number of likeliest tokens to report beside the picked one; 0 reports the picked one alone.
        mode: "raw" takes the model's own logits; "processed" takes what the token was picked from: after the penalties,
            the constraint, and, unless the choice is greedy, temperature, top_k, top_p and min_p.

    Raises:
        RequestError: `logprobs` or `logprobs_mode` is not valid.
    """

    top: int
    mode: LogprobsMode = "raw"

    def __post_init__(self) -> None:
        if isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 0:
            raise RequestError(
                "the value is not a number of tokens",
                field="logprobs",
                got=shown(self.top),
                wanted="a whole number, 0 or more, or None",
            )
        if not isinstance(self.mode, str) or self.mode not in get_args(LogprobsMode):
            raise RequestError(
                "the mode is unknown", field="logprobs_mode", got=shown(self.mode), wanted="raw or processed"
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token of a completion, in nats.

    Attributes:
        token: the id that was picked.
        logprob: its log-probability; minus infinity if the settings had excluded it (a constraint that forced it).
        top: the likeliest ids with their log-probabilities, the likeliest first, ties by the lowest id.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def raw_logprobs(logits: NDArray[np.floating], token: int, top: int) -> TokenLogprobs:
    """Return the log-probabilities under softmax of the logits [vocab]."""
    if not np.isfinite(logits).all():
        logits = finite(logits)
    most = float(logits.max())
    total = most + float(np.log(np.exp(logits - most).sum(dtype=np.float64)))
    return TokenLogprobs(token, float(logits[token]) - total, _likeliest(logits, total, top))


def processed_logprobs(scores: NDArray[np.floating], token: int, top: int, sampling: Sampling) -> TokenLogprobs:
    """Return the log-probabilities of what a token was picked from.

    Args:
        scores: the logits [vocab] after the penalties and the constraint.
        token: the token.
        top: the number of likeliest tokens.
        sampling: the settings; at temperature 0 the distribution is softmax of `scores`.
    """
    if sampling.temperature == 0:
        return raw_logprobs(scores, token, top)
    ids, probabilities = candidates(scores, sampling)
    logs = np.log(probabilities)
    at = int(ids.searchsorted(token))
    own = float(logs[at]) if at < len(ids) and ids[at] == token else -np.inf
    return TokenLogprobs(token, own, tuple((int(ids[i]), value) for i, value in _likeliest(logs, 0.0, top)))


def _likeliest(logits: NDArray[np.floating], total: float, top: int) -> tuple[tuple[int, float], ...]:
    top = min(top, len(logits))
    if not top:
        return ()
    # All ties at the boundary are sorted, so that the order of the partition has no effect.
    most = np.flatnonzero(logits >= np.partition(logits, -top)[-top])
    order = most[np.argsort(-logits[most], kind="stable")][:top]
    return tuple((int(i), float(logits[i]) - total) for i in order)

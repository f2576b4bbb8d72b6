"""The settings for picking tokens, which are checked once.

The order and the meaning of the settings are those of transformers' generate, and for those that it does not have
(`logit_bias`, `frequency_penalty`, `presence_penalty`) those of OpenAI's API.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from ..errors import RequestError, shown

_MOST_BIAS = 100.0


@dataclass(frozen=True)
class Sampling:
    """The settings for choosing the next token. The default is greedy.

    They apply in this order: logit_bias, repetition_penalty, frequency_penalty and presence_penalty, min_new_tokens,
    temperature, top_k, top_p, min_p.

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
        frequency_penalty: what is subtracted from a token's logit for each time that the completion has it; in
            [-2, 2], 0 changes nothing.
        presence_penalty: what is subtracted from the logit of every token that the completion has; in [-2, 2], 0
            changes nothing.
        logit_bias: what is added to the logits of single ids, in [-100, 100]; -100 and 100 practically ban and force
            an id.
        min_new_tokens: the number of tokens before which no end-of-sequence id is picked. Stop strings still end the
            completion, and where a constraint allows nothing but the end, it wins.

    Raises:
        RequestError: a value has a wrong type or is out of range; the error's field names the setting.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    min_new_tokens: int = 0

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
        object.__setattr__(self, "logit_bias", MappingProxyType(_biases(self.logit_bias)))

    @property
    def changes_logits(self) -> bool:
        """Whether a setting changes logits before temperature does."""
        return bool(
            self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
            or self.logit_bias
            or self.min_new_tokens
        )


_PENALTY = "a number from -2 to 2"
_RULES: tuple[tuple[str, type[int] | type[float], Callable[[Any], bool], str], ...] = (
    ("temperature", float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    ("top_k", int, lambda x: x >= 0, "an integer, 0 or more"),
    ("top_p", float, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    ("min_p", float, lambda x: 0 <= x < 1, "a number, 0 or more, below 1"),
    ("repetition_penalty", float, lambda x: 0 < x < math.inf, "a finite number above 0"),
    ("seed", int, lambda x: x >= 0, "an integer, 0 or more, or None"),
    ("frequency_penalty", float, lambda x: -2 <= x <= 2, _PENALTY),
    ("presence_penalty", float, lambda x: -2 <= x <= 2, _PENALTY),
    ("min_new_tokens", int, lambda x: x >= 0, "an integer, 0 or more"),
)


def _biases(given: object) -> dict[int, float]:
    """Return the biases by id. JSON has no integer keys, so an id may also be written as a string of digits."""
    if not isinstance(given, Mapping):
        raise RequestError("the value is not a mapping", field="logit_bias", got=shown(given), wanted="{id: bias}")
    found: dict[int, float] = {}
    for key, value in given.items():
        written = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token, bias = _number(int(key) if written else key, int), _number(value, float)
        if token is None or token < 0:
            raise RequestError("the key is not a token id", field="logit_bias", got=shown(key), wanted="a token id")
        if bias is None or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise RequestError(
                "the bias is not valid",
                field=f"logit_bias[{token}]",
                got=shown(value),
                wanted="a number from -100 to 100",
            )
        if token in found:
            raise RequestError("an id has two biases", field="logit_bias", got=shown(key), wanted="each id once")
        found[int(token)] = float(bias)
    return found


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

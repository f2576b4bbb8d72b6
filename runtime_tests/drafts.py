"""Drafters for tests: they know the completion and draft it right, wrong, or right up to some id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any


class Scripted:
    """A drafter whose drafts follow a script.

    Args:
        completion: a function that returns the next ids after some ids, as many as it is asked for.
        script: for each draft the number of right ids and the number of wrong ones after them; it begins again at its
            end.
        vocab_size: the size of the vocabulary, which the wrong ids stay in.
    """

    def __init__(
        self, completion: Callable[[Sequence[int], int], list[int]], script: Sequence[tuple[int, int]], vocab_size: int
    ) -> None:
        self._completion, self._script, self._vocab_size = completion, cycle(script), vocab_size

    def draft(self, tokens: Sequence[int], room: int) -> list[int]:
        right, wrong = next(self._script)
        ids = self._completion(tokens, right + wrong)
        return [
            token if place < right else (token + 1) % self._vocab_size
            for place, token in enumerate(ids[: max(0, room)])
        ]

    def __call__(self, _most: int, _cost: Any) -> Scripted:
        """Return itself, so that it can stand in for the class `Drafter`."""
        return self


def after(whole: Sequence[int], vocab_size: int) -> Callable[[Sequence[int], int], list[int]]:
    """Return a function for `Scripted`: what follows in `whole`, and zeros after its end or where the ids differ."""

    def completion(tokens: Sequence[int], count: int) -> list[int]:
        known = list(whole[len(tokens) :]) if list(whole[: len(tokens)]) == list(tokens) else []
        return [*known, *[0] * count][:count]

    return completion

"""The fixed beginning in which prompts with a context and prompts without it differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beginning:
    """The ids in front of every query.

    Attributes:
        teacher: the first ids of every prompt with the context.
        student: the ids that stand in their place without the context.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...]


def beginnings_of(prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> set[Beginning]:
    """Return the different beginnings of prompts (with the context, without it); after them both are the same."""
    found = set()
    for teacher, student in prompts:
        same = zip(reversed(teacher), reversed(student), strict=False)
        tail = next((i for i, (one, other) in enumerate(same) if one != other), min(len(teacher), len(student)))
        found.add(Beginning(tuple(teacher[: len(teacher) - tail]), tuple(student[: len(student) - tail])))
    return found


def beginning_of(prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Beginning | None:
    """Return the one beginning in which prompts differ; None if there are several, or if it is empty.

    At least one id follows it in every prompt: the model has to run something to predict the first id of an answer.
    """
    found = beginnings_of(prompts)
    if len(found) != 1:
        return None
    beginning = found.pop()
    followed = all(len(teacher) > len(beginning.teacher) for teacher, _student in prompts)
    return beginning if beginning.teacher and followed else None

"""The fixed beginning in which prompts with a context and prompts without it differ.

A patch with entries replaces this beginning, so the exporter and the runtime have to find the same one. Only token ids
matter here: a chat template may write a default system message, or put the context into the first user message.
"""

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


def in_front_of(system: str, context: str) -> str:
    """Return a system message with a context in front of it, which entries may stand in for."""
    return f"{context}\n\n{system}"


def writes_the_date(template_source: str | None) -> bool:
    """Return whether a chat template writes the date, so that tomorrow's prompts begin differently.

    Args:
        template_source: the text of the template; None in completion style.
    """
    return "strftime_now" in (template_source or "")

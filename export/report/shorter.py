"""A shorter prompt: the honest rival of a patch, above all of one that stands in for a list of examples.

It costs no file and no fit, but its tokens are in the context of every session. The beginning of the prompt is cut off
after some of its lines; a prompt of few lines is cut after some of its sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from ..measure import Student
from ..rollout import Dialogue

_FEWEST_LINES = 4
_EIGHTHS = (1, 2, 4, 6)
_LINE, _SENTENCE = re.compile(r"[^\n]*\S[^\n]*"), re.compile(r"\S.*?(?:[.!?](?=\s)|\Z)", re.DOTALL)


def shorter_prompts(context: str) -> dict[str, str]:
    """Return the first eighth, quarter, half and three quarters of the lines of a prompt, by label, shortest first.

    Lines without text do not count. The numbers are rounded down, but to no less than one. The result is empty for a
    prompt of one line with one sentence.
    """
    ends, unit = [found.end() for found in _LINE.finditer(context)], "lines"
    if len(ends) < _FEWEST_LINES:
        ends, unit = [found.end() for found in _SENTENCE.finditer(context)], "sentences"
    counts = sorted({max(1, len(ends) * eighths // 8) for eighths in _EIGHTHS} - {len(ends)}) if ends else []
    return {f"{count} of {len(ends)} {unit}": context[: ends[count - 1]] for count in counts}


class ShorterPromptArm:
    """The arm of the base that sees another prompt than the dialogues' own.

    Args:
        student: the base.
        prompts: the ids of the prompt with the shorter context, by the ids of the dialogue's prompt without context.
    """

    def __init__(self, student: Student, prompts: Mapping[tuple[int, ...], tuple[int, ...]]) -> None:
        self._student, self._prompts = student, prompts

    def attached(self) -> AbstractContextManager[None]:
        """Return the context of the student."""
        return self._student.attached()

    def __call__(self, dialogue: Dialogue) -> Tensor:
        """Return the logits [completion tokens, vocab]."""
        prompt = self._prompts[dialogue.student_prompt]
        return self._student((*prompt, *dialogue.completion[:-1]), len(prompt) - 1)

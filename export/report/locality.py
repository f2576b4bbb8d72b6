"""The effect on unrelated input: KL(base || arm) on text that the prompt does not concern.

The input is plain text outside any chat template, and unrelated questions with the base model's own answers. A prompt
has an effect there too, and that effect is the value to compare the patch's with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from typing import Any

from torch import Tensor

from ..measure import Student
from ..queries import load_questions
from ..rollout import Dialogue, Ending, Prompting, complete
from ..source import Source


def built_in(name: str) -> list[str]:
    """Return the lines of one of the built-in texts, without comments."""
    with as_file(files("tp_export.data") / f"{name}.txt") as path:
        return load_questions(path)


def plain_text(source: Source, context: str, passages: Sequence[str]) -> list[Dialogue]:
    """Return each passage as a dialogue of raw text, without the chat template.

    The teacher prompt is the context as text, a blank line and the passage's first token.
    """
    dialogues = []
    before = source.codec.render(f"{context.rstrip()}\n\n", raw=True)
    for passage in passages:
        ids = source.codec.render(passage, raw=True)
        starts = 2 if ids[0] == source.codec.bos_id else 1
        own = ids[starts - 1 :]  # the passage without the BOS token
        dialogues.append(Dialogue((*before, own[0]), tuple(ids[:starts]), tuple(own[1:])))
    return dialogues


class BehindPrefix:
    """The student of a patch with a KV prefix, for text that does not begin with the ids that the prefix replaces.

    Those ids are put in front of the text, so that it follows the prefix; it does so too if the prefix stands in front
    of a system message, which plain text does not have.

    Args:
        student: a student that runs under the patch.
        replaces: the token ids that the patch's KV prefix replaces; if empty, the student is called unchanged.
    """

    def __init__(self, student: Student, replaces: Sequence[int]) -> None:
        self._student, self._replaces = student, tuple(replaces)

    def attached(self) -> AbstractContextManager[None]:
        """Return the context of the wrapped student."""
        return self._student.attached()

    def __call__(self, tokens: Sequence[int], first: int) -> Tensor:
        """Return the logits [len(tokens) - first, vocab] of the positions from `first` on."""
        own = 1 if self._replaces and tokens[:1] == self._replaces[:1] else 0  # BOS is already at the front of the ids
        return self._student((*self._replaces, *tokens[own:]), len(self._replaces) + first - own)


def base_answers(model: Any, asked: Prompting, questions: Sequence[str], max_new_tokens: int) -> list[Dialogue]:
    """Return dialogues of unrelated questions, answered by the base model without the prompt.

    The questions have system messages of their own where `asked` has some, as the held-out queries do.
    """
    student = [tuple(asked.student(question)) for question in questions]
    teacher = [tuple(asked.teacher(question)) for question in questions]
    found = complete(model, student, max_new_tokens, Ending.of(asked.codec))
    return [Dialogue(*parts) for parts in zip(teacher, student, found, strict=True)]

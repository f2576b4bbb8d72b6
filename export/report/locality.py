"""Effect on unrelated input: KL(base || arm) where the prompt has no business.

Plain text outside any chat frame, and unrelated questions with the base model's own answers. A prompt has an effect
there too: it is the yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Any

from torch import Tensor

from tp_runtime.patch import Patch

from ..measure import Student
from ..queries import load_questions
from ..rollout import Dialogue, complete
from ..source import Source


def built_in(name: str) -> list[str]:
    """The lines of one of the built-in texts, without comments."""
    with as_file(files("tp_export.data") / f"{name}.txt") as path:
        return load_questions(path)


def plain_text(source: Source, context: str, passages: Sequence[str]) -> list[Dialogue]:
    """Passages as raw text; the teacher prompt is the context as text, a blank line and the passage's first token."""
    dialogues = []
    before = source.codec.render(f"{context.rstrip()}\n\n", raw=True)
    for passage in passages:
        ids = source.codec.render(passage, raw=True)
        starts = 2 if ids[0] == source.codec.bos_id else 1
        own = ids[starts - 1 :]  # the passage alone, without the token that begins every text
        dialogues.append(Dialogue((*before, own[0]), tuple(ids[:starts]), tuple(own[1:])))
    return dialogues


def behind_prefix(student: Student, patch: Patch) -> Student:
    """The student of a patch, for text that knows nothing of its KV prefix: that text is put behind the prefix."""
    if patch.prefix is None:
        return student
    replaced = patch.prefix.replaces

    def run(tokens: Sequence[int], first: int) -> Tensor:
        own = 1 if tokens[:1] == replaced[:1] else 0  # what begins every text stands at the front once
        return student((*replaced, *tokens[own:]), len(replaced) + first - own)

    return run


def base_answers(
    source: Source, model: Any, context: str, questions: Sequence[str], max_new_tokens: int
) -> list[Dialogue]:
    """Unrelated questions answered by the base model with no prompt."""
    student = [tuple(source.codec.render(question)) for question in questions]
    teacher = [tuple(source.codec.render(question, context)) for question in questions]
    found = complete(model, student, max_new_tokens, source.codec.eos_ids)
    return [Dialogue(*parts) for parts in zip(teacher, student, found, strict=True)]

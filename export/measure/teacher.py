"""The prompted model behind the context's cached keys and values: the context runs once and not once per query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tp_runtime.text import beginning_of

from ..decoder import cached_prompt
from ..rollout import Dialogue
from .students import Student, TorchStudent


def cached_teacher(model: Any, dialogues: Sequence[Dialogue]) -> Student:
    """Return the base as the teacher of some dialogues; it can be called with their teacher's sequences only.

    Args:
        model: a transformers causal language model whose architecture has an adapter.
        dialogues: the dialogues. If their prompts with the context and without it differ in one beginning, the keys and
            values of that beginning are computed here; otherwise the teacher runs whole sequences.
    """
    beginning = beginning_of([(dialogue.teacher_prompt, dialogue.student_prompt) for dialogue in dialogues])
    if beginning is None:
        return TorchStudent(model)
    return TorchStudent(model, cached=cached_prompt(model, beginning.teacher, beginning.teacher))

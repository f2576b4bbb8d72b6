"""This module takes key/value entries from the beginning of dialogues, all of them or some, without a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tp_export.decoder import TorchPrefix, cached_prompt
from tp_export.rollout import Dialogue
from tp_runtime.text import beginning_of


def all_entries(model: Any, dialogues: Sequence[Dialogue]) -> TorchPrefix:
    """Return the cached beginning of the teacher's prompts, with the ids that it replaces in the student's prompts."""
    beginning = beginning_of([(d.teacher_prompt, d.student_prompt) for d in dialogues])
    assert beginning is not None
    return cached_prompt(model, beginning.teacher, beginning.student)


def some_entries(model: Any, dialogues: Sequence[Dialogue], count: int) -> TorchPrefix:
    """Return the first `count` entries of the beginning in every layer."""
    found = all_entries(model, dialogues)
    return replace(found, entries=[(keys[:, :count], values[:, :count]) for keys, values in found.entries])

"""The teacher's answers to prompts, kept in a file on request, and the aligned sequences of teacher and student.

This room knows nothing of how a patch is fitted or measured.
"""

from .beginning import Beginning, beginning_of, beginnings_of
from .completions import complete
from .context import Context, check_beginning, check_text, context_length
from .dialogues import check_prompts, context_digest, dialogues_for
from .ending import Ending
from .restated import restated_dialogues
from .sequences import Batch, Dialogue, batches
from .store import RolloutStore

__all__ = [
    "Batch",
    "Beginning",
    "Context",
    "Dialogue",
    "Ending",
    "RolloutStore",
    "batches",
    "beginning_of",
    "beginnings_of",
    "check_beginning",
    "check_prompts",
    "check_text",
    "complete",
    "context_digest",
    "context_length",
    "dialogues_for",
    "restated_dialogues",
]

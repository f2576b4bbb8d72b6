"""The teacher's answers to prompts, kept in a file on request, and the aligned sequences of teacher and student.

This room knows nothing of how a patch is fitted or measured.
"""

from .completions import complete
from .dialogues import check_prompts, context_digest, dialogues_for
from .ending import Ending
from .sequences import Batch, Dialogue, batches
from .store import RolloutStore

__all__ = [
    "Batch",
    "Dialogue",
    "Ending",
    "RolloutStore",
    "batches",
    "check_prompts",
    "complete",
    "context_digest",
    "dialogues_for",
]

"""The teacher's answers to prompts, kept in a file on request, and the aligned sequences of teacher and student.

This room knows nothing of how a patch is fitted or measured.
"""

from .completions import complete
from .context import Context, check_beginning, check_text, context_length
from .dialogues import check_prompts, dialogues_for
from .ending import Ending
from .prompting import Prompting, PromptPair
from .restated import restated_dialogues
from .sequences import Batch, Dialogue, batches
from .store import RolloutStore

__all__ = [
    "Batch",
    "Context",
    "Dialogue",
    "Ending",
    "PromptPair",
    "Prompting",
    "RolloutStore",
    "batches",
    "check_beginning",
    "check_prompts",
    "check_text",
    "complete",
    "context_length",
    "dialogues_for",
    "restated_dialogues",
]

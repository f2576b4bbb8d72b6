"""What the teacher says: completions of prompts, kept in a file if asked, and the aligned sequences made of them.

Knows nothing of how a patch is fitted or measured.
"""

from .completions import complete
from .dialogues import check_length, context_digest, dialogues_for
from .sequences import Batch, Dialogue, batches
from .store import RolloutStore

__all__ = [
    "Batch",
    "Dialogue",
    "RolloutStore",
    "batches",
    "check_length",
    "complete",
    "context_digest",
    "dialogues_for",
]

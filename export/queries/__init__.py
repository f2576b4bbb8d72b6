"""The queries that a patch is fitted and measured on: read from files, held out, or written by the model itself.

This room knows nothing of how a patch is fitted or measured.
"""

from .questions import (
    check_disjoint,
    check_unfitted,
    load_answers,
    load_questions,
    query_digest,
    save_questions,
    split_holdout,
    unlike,
)
from .self_study import statements, write_questions
from .system_messages import SystemMessages, load_system_messages

__all__ = [
    "SystemMessages",
    "check_disjoint",
    "check_unfitted",
    "load_answers",
    "load_questions",
    "load_system_messages",
    "query_digest",
    "save_questions",
    "split_holdout",
    "statements",
    "unlike",
    "write_questions",
]

"""System messages that queries have of their own, behind a prompt that a patch replaces.

Those that a patch is fitted behind and those that it is measured behind are different messages, where there are enough.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from .questions import load_questions

_HELD_OUT_SHARE = 4  # one in so many is held out


class SystemMessages(NamedTuple):
    """The system messages of queries.

    Attributes:
        fitted: those of the calibration queries, at least one.
        held_out: those of the held-out queries, at least one; `fitted` again if there are fewer than four in all.
    """

    fitted: tuple[str, ...]
    held_out: tuple[str, ...]


def load_system_messages(path: Path | None) -> SystemMessages:
    """Read system messages, of which the last quarter is held out.

    Args:
        path: a text file with one message per line, or a `.json` or `.jsonl` file of strings, see `load_questions`;
            None for the built-in messages.

    Raises:
        CalibrationError: `load_questions` raises it.
        OSError: the file cannot be read.
    """
    if path is None:
        text = (files("tp_export.data") / "system-messages.txt").read_text(encoding="utf-8")
        messages = [line for line in text.splitlines() if not line.startswith("#")]
    else:
        messages = load_questions(path)
    kept = len(messages) // _HELD_OUT_SHARE
    if not kept:
        return SystemMessages(tuple(messages), tuple(messages))
    return SystemMessages(tuple(messages[:-kept]), tuple(messages[-kept:]))

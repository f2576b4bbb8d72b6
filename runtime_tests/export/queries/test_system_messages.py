"""System messages that queries have of their own: the built-in ones, those of a file, and which are held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp_export.queries import SystemMessages, load_system_messages
from tp_runtime.errors import CalibrationError


def test_the_last_quarter_is_held_out(tmp_path: Path) -> None:
    built_in = load_system_messages(None)
    assert len(built_in.fitted) == 9 and len(built_in.held_out) == 3
    assert not set(built_in.fitted) & set(built_in.held_out)
    file = tmp_path / "systems.txt"
    file.write_text("# a comment\na\nb\n\nc\nd\n")
    assert load_system_messages(file) == SystemMessages(("a", "b", "c"), ("d",))


@pytest.mark.parametrize("lines", ["a", "a\nb\nc"])
def test_a_few_messages_are_both_fitted_and_held_out(tmp_path: Path, lines: str) -> None:
    file = tmp_path / "systems.txt"
    file.write_text(lines)
    assert load_system_messages(file) == SystemMessages(tuple(lines.split()), tuple(lines.split()))


def test_a_file_without_messages_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "systems.txt"
    file.write_text("# nothing\n")
    with pytest.raises(CalibrationError, match=r"systems\.txt"):
        load_system_messages(file)

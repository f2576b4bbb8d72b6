"""The history file of `tp-runtime chat`: what is kept, for whom, and what happens if the file is not as it was left."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from tp_runtime.cli import history as module
from tp_runtime.cli.history import History


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_entries_come_back_in_order_with_their_lines(home: Path) -> None:
    assert History().read() == []
    for text in ("one", "zwei\nlines ä 🙂", "\x1b[31mred\u2028"):
        History().append(text)
    assert History().read() == ["one", "zwei\nlines ä 🙂", "\x1b[31mred\u2028"]
    assert os.listdir(home) == ["chat_history.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_only_the_user_can_read_the_file(home: Path) -> None:
    History().append("one")
    file = home / "chat_history.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    History().append("two")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", " \n", "/system You are Bob.", "/system", "x" * 10_001])
def test_system_messages_blank_and_very_long_entries_are_left_out(home: Path, text: str) -> None:
    History().append(text)
    assert not home.exists()


def test_the_file_is_shortened_when_it_grows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 3)
    monkeypatch.setattr(module, "_MOST", 5)
    for number in range(6):
        History().append(str(number))
    assert History().read() == ["3", "4", "5"]
    file = home / "chat_history.jsonl"
    assert file.read_text() == '"3"\n"4"\n"5"\n'
    assert sys.platform == "win32" or stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_no_entry_is_passed_over(home: Path) -> None:
    home.mkdir()
    bad = [b"one", b"5", b"null", b'["a"]', b'"a', b"\xff", b'"\\ud800"', json.dumps("x" * 10_001).encode()]
    (home / "chat_history.jsonl").write_bytes(b"\n".join([*bad, b'"good"', b""]))
    assert History().read() == ["good"]


def test_a_file_that_is_none_or_too_large_is_an_error_of_the_system(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    file = home / "chat_history.jsonl"
    file.mkdir()
    for call in (lambda: History().read(), lambda: History().append("x")):
        with pytest.raises(OSError):
            call()
    file.rmdir()
    (tmp_path / "elsewhere").touch()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        History().append("x")
    assert (tmp_path / "elsewhere").read_bytes() == b""
    file.unlink()
    monkeypatch.setattr(module, "_MAX_BYTES", 3)
    file.write_text('"abc"\n')
    with pytest.raises(OSError, match="too large"):
        History().read()

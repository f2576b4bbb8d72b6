"""What is typed into a chat: keys through prompt_toolkit, the history, and plain lines without either."""

from __future__ import annotations

import builtins
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from tp_runtime.cli.history import History
from tp_runtime.cli.lines import edited_entries, read_lines

prompt_toolkit = pytest.importorskip("prompt_toolkit")

ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def typed(keys: str) -> list[str]:
    """Return the entries of a person who presses these keys."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return list(edited_entries())


def test_enter_sends_an_entry_and_ctrl_d_leaves() -> None:
    assert typed(f"one{ENTER}two{ENTER}{CTRL_D}three{ENTER}") == ["one", "two"]


def test_alt_enter_begins_a_new_line_of_the_entry() -> None:
    assert typed(f"one{ALT_ENTER}two{ENTER}{CTRL_D}") == ["one\ntwo"]


def test_a_pasted_text_keeps_its_lines() -> None:
    assert typed(f"\x1b[200~one\ntwo\n\x1b[201~three{ENTER}{CTRL_D}") == ["one\ntwo\nthree"]


def test_ctrl_c_discards_what_is_typed_and_says_how_to_leave(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f"half{CTRL_C}one{ENTER}{CTRL_D}") == ["one"]
    assert "Ctrl-D or /quit" in capsys.readouterr().err


def test_a_chat_begins_with_the_entries_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # prompt_toolkit reads its history in the background, so a key that asks for an entry could come too early here.
    offered: list[list[str]] = []
    memory = prompt_toolkit.history.InMemoryHistory

    def made(entries: list[str]) -> Any:
        offered.append(list(entries))
        return memory(entries)

    monkeypatch.setattr("prompt_toolkit.history.InMemoryHistory", made)
    typed(f"one{ENTER}two{ALT_ENTER}lines{ENTER}{CTRL_D}")
    typed(f"three{ENTER}{CTRL_D}")
    typed(CTRL_D)
    assert offered == [[], ["one", "two\nlines"], ["one", "two\nlines", "three"]]


def test_a_system_message_is_not_written_to_the_history(home: Path) -> None:
    assert typed(f"/system Secret.{ENTER}one{ENTER}{CTRL_D}") == ["/system Secret.", "one"]
    assert History().read() == ["one"]
    assert b"Secret" not in (home / "chat_history.jsonl").read_bytes()


def test_a_history_that_cannot_be_kept_is_reported_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.write_text("a file in the place of the folder")
    assert typed(f"one{ENTER}two{ENTER}{CTRL_D}") == ["one", "two"]
    assert capsys.readouterr().err.count("there is no history") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_without_prompt_toolkit_gives_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Any] = ["one", KeyboardInterrupt(), "two", EOFError()]

    def answer(_prompt: str) -> str:
        event = events.pop(0)
        if isinstance(event, BaseException):
            raise event
        return event

    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert list(read_lines()) == ["one", "two"]
    assert "Ctrl-D or /quit" in capsys.readouterr().err


def test_a_pipe_gives_plain_lines_and_no_history(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\ntwo"))
    assert list(read_lines()) == ["one", "two"]
    monkeypatch.setattr(sys, "stdin", None)
    assert list(read_lines()) == []
    assert not home.exists()

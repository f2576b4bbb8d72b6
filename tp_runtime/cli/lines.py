"""The lines of a chat: from a pipe or a file, or typed on a terminal, edited by prompt_toolkit if it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from .history import History
from .printing import emit, note

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

_PROMPT = "> "
_HOW_TO_LEAVE = "(type Ctrl-D or /quit to leave the chat)"


def read_lines() -> Iterator[str]:
    """Yield what is typed, up to Ctrl-D or the end of stdin. On a terminal an entry may have several lines."""
    if sys.stdin is None:
        return
    if not (sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()):
        yield from _piped_lines()
        return
    try:
        import prompt_toolkit  # noqa: F401 - the extra `chat` installs it
    except ImportError:
        yield from _typed_lines()
    else:
        yield from edited_entries()


def _piped_lines() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):
        # Bytes that are not UTF-8 reach the codec, which refuses them with a clear message.
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _typed_lines() -> Iterator[str]:
    """Yield lines that Python's own line editor reads."""
    with suppress(ImportError):  # Windows has its own line editor
        import readline  # noqa: F401 - input() uses it to edit lines
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            emit("\n")
            return
        except KeyboardInterrupt:
            note("\n" + _HOW_TO_LEAVE)
        except UnicodeDecodeError:
            note("error: the line is not valid UTF-8")


def edited_entries() -> Iterator[str]:
    """Yield entries of one or several lines that prompt_toolkit reads, with a history that is kept on disk.

    Enter sends the entry. Alt-Enter (or Esc, then Enter) begins a new line, and a pasted text keeps its lines.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    history, entries = _open_history()
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(entries), multiline=True, key_bindings=_keys(), prompt_continuation=""
    )
    while True:
        try:
            text = session.prompt(_PROMPT)
        except EOFError:
            return
        except KeyboardInterrupt:
            note(_HOW_TO_LEAVE)
            continue
        if history is not None:
            try:
                history.append(text)
            except OSError as error:
                history = None
                note(f"the history of this chat is not kept: {error}")
        yield text


def _open_history() -> tuple[History | None, list[str]]:
    try:
        history = History()
        return history, history.read()
    except OSError as error:
        note(f"there is no history: {error}")
        return None, []


def _keys() -> KeyBindings:
    from prompt_toolkit.application import get_app
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching the history

    @keys.add("enter", filter=typing)
    def _send(_event: object) -> None:
        get_app().current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _new_line(_event: object) -> None:
        get_app().current_buffer.insert_text("\n")

    return keys

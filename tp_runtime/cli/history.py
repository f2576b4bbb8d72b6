"""The lines that were typed into `tp-runtime chat`, in a file that only the user can read.

A system message can be confidential, so `/system` lines are left out; the text of `--system` is no line at all.
"""

from __future__ import annotations

import json
import os

from ..storage import (
    ANY_FILE,
    StrictJSONError,
    UnreadableFileError,
    atomic_file,
    parse_json,
    read_regular,
    user_folder,
)

_NAME = "chat_history.jsonl"
_PRIVATE = 0o600
_KEPT = 1000  # entries that stay when the file is shortened
_MOST = 2 * _KEPT  # entries at which it is shortened
_LONGEST = 10_000  # characters of an entry; a longer one is a pasted text that nobody looks up again
_MAX_BYTES = 2**27  # of the file; more than its entries can take


class History:
    """The history file. Each of its lines is one entry, as a JSON string.

    Raises:
        OSError: the user has no home directory.
    """

    def __init__(self) -> None:
        self._path = user_folder(_NAME)

    def read(self) -> list[str]:
        """Return the entries, the oldest first. What is no entry is passed over.

        Raises:
            OSError: the file cannot be read or shortened, or is something else than a file.
        """
        try:
            raw = read_regular(self._path, _MAX_BYTES)
        except FileNotFoundError:
            return []
        except UnreadableFileError as error:
            raise OSError(f"{error.problem}: {self._path}") from None
        entries = [entry for line in raw.split(b"\n") if (entry := _parse(line)) is not None]
        if len(entries) > _MOST:
            entries = entries[-_KEPT:]
            with atomic_file(self._path, ANY_FILE) as temporary:
                os.chmod(temporary, _PRIVATE)
                temporary.write_text("".join(map(_line, entries)), encoding="utf-8")
        return entries

    def append(self, text: str) -> None:
        """Add an entry, unless it is blank, too long, or sets a system message.

        Raises:
            OSError: the file cannot be written.
        """
        if not text.strip() or len(text) > _LONGEST or text.startswith("/system"):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A link in the place of the file could lead anywhere, and is not followed.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self._path, flags, _PRIVATE)
        with os.fdopen(descriptor, "ab") as file:
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), _PRIVATE)  # it may have been made with another mode
            file.write(_line(text).encode())


def _line(entry: str) -> str:
    return json.dumps(entry) + "\n"


def _parse(line: bytes) -> str | None:
    try:
        entry = parse_json(line)
    except StrictJSONError:
        return None
    return entry if isinstance(entry, str) and len(entry) <= _LONGEST else None

"""SHA-256 digests of files, and the form in which the files of this project store a digest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from .regular_file import open_regular

SHA256 = re.compile(r"[0-9a-f]{64}")
"""Matches a SHA-256 in lower-case hex; use it with `fullmatch`."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a regular file in lower-case hex. The file is read in chunks.

    Raises:
        UnreadableFileError: the path leads to something else than a regular file.
        OSError: there is no such file, or the operating system refuses to read it.
    """
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

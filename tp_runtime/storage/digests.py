"""SHA-256 digests of files, and the form in which the files of this project store a digest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")
"""Matches a SHA-256 in lower-case hex; use it with `fullmatch`."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hex. The file is read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

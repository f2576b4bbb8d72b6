"""This module turns what libraries make of the operating system's errors back into those errors.

A full disk must be reported as a full disk. Libraries written in other languages raise their own exceptions instead:
those in Rust (safetensors, tokenizers) name the error's number in the text, and others wrap the OSError.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 2**20  # bytes; more than a file system leaves free at the end of a file
_NUMBER = re.compile(r"\(os error (\d+)\)")
# What a write meets on a healthy path. Other numbers, such as a missing file, may be a fault of the library's input.
_ON_WRITING = {getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS")}


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise OSError instead of a library's exception that stands for an error of the operating system on writing."""
    try:
        yield
    except Exception as error:
        if (found := _system_error(error)) is None or found is error:
            raise
        raise OSError(found.errno, found.strerror, found.filename) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the system's error that an exception is, names or was raised from; None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _ON_WRITING:
            return error
        if (match := _NUMBER.search(str(error))) and int(match[1]) in _ON_WRITING:
            return OSError(int(match[1]), os.strerror(int(match[1])))
        error = error.__cause__ or error.__context__
    return None


def check_writable(*files: Path) -> None:
    """Append a block to files that a library failed to write, for libraries that do not say why they failed.

    The caller deletes the files afterwards. On a full disk this raises the error that the library met.

    Raises:
        OSError: the operating system refuses the block, for example because the disk is full.
    """
    for file in files:
        with file.open("ab") as handle:
            handle.write(bytes(_BLOCK))
            handle.flush()
            os.fsync(handle.fileno())

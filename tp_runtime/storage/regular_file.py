"""This module reads regular files: each is opened once, and what was opened is checked, so that nothing else is read.

Opening a FIFO waits for a writer, and reading a device may never end. So a file is opened without waiting, and the
checks use the opened file and not its path, because the path may lead to another file by then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""The numbers of the errors that say that there is nothing at a path."""

# What opening a socket, or a device without hardware, gives.
_NOT_OPENED = (errno.ENXIO, errno.ENODEV)


class UnreadableFileError(ValueError):
    """There is something else than a regular file of at most the permitted size at the path.

    Attributes:
        problem: a clause with a subject, such as "the path is not a regular file".
        got: what was found.
        wanted: what would have been accepted.
    """

    def __init__(self, problem: str, got: object, wanted: str) -> None:
        super().__init__(f"{problem}; got {got}")
        self.problem, self.got, self.wanted = problem, got, wanted


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """Open a regular file, or a symlink to one, for reading. Anything else is refused at once, also a FIFO.

    Yields:
        The opened file, which is closed afterwards.

    Raises:
        UnreadableFileError: the path is not valid, or leads to something else than a regular file.
        OSError: there is no such file, or the operating system refuses to open it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL in the path
        raise UnreadableFileError("the path is not valid", str(error), "the path of a file") from error
    except OSError as error:
        if error.errno not in _NOT_OPENED:
            raise
        raise UnreadableFileError("the path is not a regular file", error.strerror, "a file") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise UnreadableFileError("the path is not a regular file", stat.filemode(mode), "a file")
        with os.fdopen(descriptor, "rb", closefd=False) as handle:
            yield handle
    finally:
        os.close(descriptor)


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return all bytes of a regular file.

    Args:
        path: the file, or a symlink to it.
        limit: the largest size in bytes that is read.

    Raises:
        UnreadableFileError: as for `open_regular`; or the file has more than `limit` bytes.
        OSError: there is no such file, or the operating system refuses to read it.
    """
    with open_regular(path) as handle:
        if (size := os.fstat(handle.fileno()).st_size) > limit:
            raise UnreadableFileError("the file is too large", f"{size} bytes", f"at most {limit} bytes")
        return handle.read(size)

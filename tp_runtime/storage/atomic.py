"""This module writes files and folders so that they appear whole or not at all.

Everything is written next to its destination under a hidden temporary name, flushed to the disk, and renamed. Any
exception, including KeyboardInterrupt, removes the temporary file or folder and leaves the destination as it was. The
operating system's own errors, such as a full disk, are raised unchanged. What may be replaced is decided in
destination.py, when a writer starts and again before the rename.

An interruption may come at any line, also while an earlier one is being cleaned up after. So each writer chooses its
temporary names first, and one function `settle` brings every state that these names can be in to an end: the
destination is the old or the new one, whole, and nothing else is left. It is called when the block ends. If it was
interrupted itself, it is called again when the writer's frame is freed, and at the latest when the process exits. Only
a process that is killed at once (SIGKILL, a power cut) leaves a hidden name such as `.model.0123456789ab`, which may be
deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from .destination import AnyPath, Kind, check_output_file, check_output_folder, folder_mismatch

_DIGITS = 12
_KEPT = 40  # characters of a name that its temporary name repeats, so that no temporary name is too long


@contextlib.contextmanager
def atomic_file(path: AnyPath, replaces: Kind | None = None, inputs: Iterable[AnyPath] = ()) -> Iterator[Path]:
    """Provide a temporary path to write to. On success it becomes `path`.

    The temporary file exists and is empty when the block starts, so that an unwritable folder or a full disk raises
    immediately.

    Args:
        path, replaces, inputs: the destination and what it may replace; see `check_output_file`.

    Yields:
        A path in the same folder with the same suffix.

    Raises:
        OutputError: `check_output_file` refuses the destination.
        OSError: the operating system refuses an operation. No temporary file is left behind.
    """
    inputs = tuple(inputs)
    target = check_output_file(path, replaces, inputs)
    temporary = _temporary_path(target)
    with _settled(partial(_remove_file, temporary)):
        # The mode 0600 of tempfile would stay after the rename. With os.open the user's umask sets the mode.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        check_output_file(path, replaces, inputs)  # again, because another program may have written it meanwhile
        os.replace(temporary, target)
    _flush(target.parent)


@contextlib.contextmanager
def atomic_folder(path: AnyPath, replaces: Kind | None = None, inputs: Iterable[AnyPath] = ()) -> Iterator[Path]:
    """Provide a temporary folder to fill. On success it becomes `path`.

    If an old folder exists, there are two renames: the old folder gets a temporary hidden name, and then the new folder
    gets the destination's name. If the second rename fails, the old folder gets its name back. (Only a power cut
    between the two can leave the old folder under its temporary hidden name.)

    Args:
        path, replaces, inputs: the destination and what it may replace; see `check_output_folder`.

    Yields:
        An empty folder next to the destination.

    Raises:
        OutputError: `check_output_folder` refuses the destination.
        OSError: the operating system refuses an operation. Nothing is left behind.
    """
    inputs = tuple(inputs)
    target = check_output_folder(path, replaces, inputs)
    temporary, old = _temporary_path(target), _temporary_path(target)
    with _settled(partial(_settle_folder, target, temporary, old, replaces)):
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_dir() or (entry.is_file() and not entry.is_symlink()):
                _flush(entry)
        check_output_folder(target, replaces, inputs)  # again, because another program may have filled it meanwhile
        if os.path.lexists(target):
            os.rename(target, old)
            # What changed since the check gets its name back when the block ends. At `old` nothing else changes it.
            if folder_mismatch(old, replaces) is not None:
                os.rename(old, target)
                check_output_folder(target, replaces, inputs)
        os.rename(temporary, target)
        _flush(target.parent)


@contextlib.contextmanager
def temporary_folder(parent: AnyPath | None = None, prefix: str = "tp-") -> Iterator[Path]:
    """Provide a folder that is deleted when the block ends.

    tempfile.TemporaryDirectory leaves a folder behind if it is interrupted between making and remembering it.

    Args:
        parent: the folder to make it in; by default the system's folder for temporary files.
        prefix: the beginning of its name.

    Raises:
        OSError: the folder cannot be made.
    """
    import tempfile  # a process that writes nothing starts without it

    made = Path(tempfile.gettempdir() if parent is None else parent) / f"{prefix}{os.urandom(_DIGITS // 2).hex()}"
    with _settled(partial(_remove_folder, made)):
        made.mkdir(mode=0o700)
        yield made


def is_temporary_name(name: str, destination: str) -> bool:
    """Return whether `name` is one under which a file or folder called `destination` is written."""
    stem, suffix = (re.escape(part) for part in _kept(destination))
    return re.fullmatch(rf"\.{stem}\.[0-9a-f]{{{_DIGITS}}}{suffix}", name) is not None


class _Frame:
    """A local variable of a writer; it dies together with the writer's frame."""


@contextlib.contextmanager
def _settled(settle: Callable[[], None]) -> Iterator[None]:
    """Call `settle` at the end of the block, and again when the frame is freed if the first call was interrupted."""
    frame = _Frame()
    again = weakref.finalize(frame, settle)
    try:
        yield
    finally:
        settle()
        again.detach()


def _remove_file(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    import shutil  # a process that writes nothing starts without it

    shutil.rmtree(folder, ignore_errors=True)


def _settle_folder(target: Path, temporary: Path, old: Path, replaces: Kind | None) -> None:
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    _remove_folder(temporary)
    # If another program wrote the destination after it changed, `old` may hold anything, and it is kept.
    if os.path.lexists(old) and folder_mismatch(old, replaces) is None:
        _remove_folder(old)


def _temporary_path(path: Path) -> Path:
    """Return a hidden path in the same folder (a rename must not cross file systems) with the same suffix."""
    stem, suffix = _kept(path.name)
    return path.with_name(f".{stem}.{os.urandom(_DIGITS // 2).hex()}{suffix}")


def _kept(name: str) -> tuple[str, str]:
    path = Path(name)
    return path.stem[:_KEPT], path.suffix[:_KEPT]


def _flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if path.is_dir():
        # Windows cannot open a folder, and some file systems refuse to flush one. Neither is a reason to fail.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())

"""This module writes files and folders so that they appear whole or not at all.

Everything is written next to its destination under a hidden temporary name, flushed to the disk, and renamed. Any
exception, including KeyboardInterrupt, removes the temporary file or folder and leaves the destination as it was. The
operating system's own errors, such as a full disk, are raised unchanged. The contents do not matter here.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelFormatError


def _temporary_path(path: Path) -> Path:
    """Return a hidden path in the same folder (a rename must not cross file systems) with the same suffix."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")


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


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide a temporary path to write to. On success it becomes `path`, and an existing file is replaced.

    The temporary file exists and is empty when the block starts, so that an unwritable folder or a full disk raises
    immediately.

    Args:
        path: the destination; its folder must exist.

    Yields:
        A path in the same folder with the same suffix.

    Raises:
        OSError: the operating system refuses an operation. No temporary file is left behind.
    """
    target = Path(path)
    temporary = _temporary_path(target)
    try:
        # The mode 0600 of tempfile would stay after the rename. With os.open the user's umask sets the mode.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ModelFormatError(
            "the output folder cannot be created, because a file has its name",
            field=str(target),
            got="a file",
            wanted="a new or empty folder",
            fix="choose another folder",
        )
    if not overwrite and any(target.iterdir()):
        raise ModelFormatError(
            "the output folder is not empty",
            field=str(target),
            got=f"{sum(1 for _ in target.iterdir())} entries",
            wanted="a new or empty folder",
            fix="choose another folder, empty this one, or allow overwriting it",
        )


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Provide a temporary folder to fill. On success it becomes `path`.

    If an old folder exists, there are two renames: the old folder gets a temporary hidden name, and then the new folder
    gets the destination's name. If the second rename fails, the old folder gets its name back. (Only a power cut
    between the two can leave the old folder under its temporary hidden name.)

    Args:
        path: the destination; its parent folder must exist. A symlink to a folder means that folder.
        overwrite: whether to replace an existing folder that is not empty.

    Yields:
        An empty folder next to the destination.

    Raises:
        ModelFormatError: `path` is a file, or it is a folder that is not empty and `overwrite` is False.
        OSError: the operating system refuses an operation. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    _check_free(target, overwrite)
    temporary, old = _temporary_path(target), _temporary_path(target)
    try:
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_dir() or (entry.is_file() and not entry.is_symlink()):
                _flush(entry)
        _check_free(target, overwrite)  # a second check, because another program may have filled it meanwhile
        try:
            if target.exists():
                os.rename(target, old)
            os.rename(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)

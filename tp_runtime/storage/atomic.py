"""Files and folders that appear whole or not at all.

Everything is written beside its destination under a hidden temporary name, flushed to the disk, and renamed.
Any exception, KeyboardInterrupt included, removes the temporary and leaves the destination as it was; the
operating system's own errors (a full disk) pass through unchanged. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelFormatError


def _beside(path: Path) -> Path:
    """A hidden name in the same folder (a rename must not cross file systems) with the same suffix."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk."""
    if path.is_dir():
        # Windows cannot open a folder and some file systems refuse to flush one: no reason to fail.
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
    """Give a temporary path to write; on success it becomes `path`, replacing a file that is there.

    The temporary exists, empty, when the block starts, so that an unwritable folder or a full disk shows at
    once.

    Args:
        path: the destination; its folder must exist.

    Yields:
        A path in the same folder with the same suffix.

    Raises:
        OSError: whatever the operating system raises; no temporary is left behind.
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        # os.open, not tempfile: its 0600 would outlive the rename; this way the user's umask decides.
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
            "the output folder's name is taken by a file",
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
            fix="choose another folder, empty this one, or ask for it to be overwritten",
        )


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`.

    With an old folder in the way there are two renames, old aside and new in: a failure between them puts the
    old one back. (Only a power cut between them can leave the old folder under its temporary hidden name.)

    Args:
        path: the destination; its parent must exist. A symlink to a folder stands for that folder.
        overwrite: replace a folder that is there and holds something.

    Yields:
        An empty folder beside the destination.

    Raises:
        ModelFormatError: `path` is a file, or a folder that is not empty and `overwrite` is false.
        OSError: whatever the operating system raises; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    _check_free(target, overwrite)
    temporary, aside = _beside(target), _beside(target)
    try:
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_dir() or (entry.is_file() and not entry.is_symlink()):
                _flush(entry)
        _check_free(target, overwrite)  # again: someone may have filled it while we wrote
        try:
            if target.exists():
                os.rename(target, aside)
            os.rename(temporary, target)
        except BaseException:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)

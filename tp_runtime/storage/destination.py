"""This module decides what may be written where, before the work starts and again before a finished result is renamed.

A destination is free if nothing has its name, or if it is an empty file or folder. Anything else is replaced only if it
is of the kind that the same writer writes, which a `Kind` recognises by its contents, never by its name. A destination
that is, holds or lies in one of a command's inputs is always refused. This module writes and deletes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import OutputError, library_text, shortened

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Kind:
    """A kind of file or folder that a writer of this project may replace.

    Attributes:
        name: the kind, with an article, for errors: "a patch file".
        mismatch: a function that takes the path of a regular file or of a folder and returns why it is not of this
            kind, or None if it is. Whatever it raises also means that the path is not of this kind.
    """

    name: str
    mismatch: Callable[[Path], str | None]


ANY_FILE = Kind("any file", lambda _path: None)


def foreign_entries(folder: Path, files: Collection[str], folders: Collection[str] = ()) -> str | None:
    """Return a text that names the entries of `folder` other than these files and folders; None if there are none."""
    with os.scandir(folder) as entries:
        others = sorted(e.name for e in entries if e.name not in (folders if e.is_dir() else files))
    if not others:
        return None
    return f"a folder that also holds {shortened([repr(name) for name in others])}"


def check_output_file(path: AnyPath, replaces: Kind | None = None, inputs: Iterable[AnyPath] = ()) -> Path:
    """Check that a file may be written at `path`.

    Args:
        path: the destination. If it is a symlink, the link itself is replaced, and what it leads to decides whether
            this is allowed.
        replaces: the kind of file that may be replaced; None for none. An empty file is always replaced.
        inputs: files and folders that the caller reads. Those that do not exist are ignored.

    Returns:
        The destination with its folder resolved.

    Raises:
        OutputError: `path` is something that is not replaced, or it is one of the inputs or lies in one.
        OSError: the folder of `path` does not exist or cannot be written, or the operating system refuses the path.
    """
    given = _valid(path)
    target = Path(os.path.realpath(given.parent)) / given.name
    _check_parent(target.parent)
    _check_apart(given, target, inputs)
    if (problem := _file_mismatch(target, replaces)) is not None:
        wanted = "a new file" if replaces is None else f"a new file, or {replaces.name} to replace"
        _refuse(given, "the output file already exists and is not replaced", problem, wanted, "choose another name")
    return target


def check_output_folder(path: AnyPath, replaces: Kind | None = None, inputs: Iterable[AnyPath] = ()) -> Path:
    """Check that a folder may be written at `path`.

    Args:
        path: the destination. A symlink to a folder means that folder.
        replaces: the kind of folder that may be replaced; None for none. An empty folder is always replaced.
        inputs: files and folders that the caller reads. Those that do not exist are ignored.

    Returns:
        The resolved destination.

    Raises:
        OutputError: `path` is something that is not replaced, or it is one of the inputs, holds one or lies in one.
        OSError: the folder of `path` does not exist or cannot be written, or the operating system refuses the path.
    """
    given = _valid(path)
    target = Path(os.path.realpath(given))
    _check_parent(target.parent)
    _check_apart(given, target, inputs)
    if (problem := folder_mismatch(target, replaces)) is not None:
        wanted = "a new or empty folder" + ("" if replaces is None else f", or {replaces.name} to replace")
        fix = "choose another folder, or move away what this one holds"
        if replaces is None:
            fix += ", or allow overwriting it if the same command wrote it"
        _refuse(given, "the output folder already exists and is not replaced", problem, wanted, fix)
    return target


def folder_mismatch(path: Path, replaces: Kind | None) -> str | None:
    """Return why what is at `path` may not be replaced by a folder; None if there is nothing or it may be replaced."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return _kind_of(status.st_mode)
    if os.path.ismount(path):
        return "a mount point, which no folder can replace"
    names = os.listdir(path)
    if not names:
        return None
    return f"a folder with {len(names)} entries" if replaces is None else _mismatch(path, replaces)


def _file_mismatch(path: Path, replaces: Kind | None) -> str | None:
    if not os.path.lexists(path):
        return None
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "a link that leads to nothing"
    if not stat.S_ISREG(status.st_mode):
        return _kind_of(status.st_mode)
    if status.st_size == 0:
        return None
    return "a file" if replaces is None else _mismatch(path, replaces)


def _mismatch(path: Path, replaces: Kind) -> str | None:
    try:
        return replaces.mismatch(path)
    except Exception as error:  # whatever is wrong with the contents, they are not of this kind
        return f"something else ({library_text(error)})"


def _kind_of(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a link" if stat.S_ISLNK(mode) else "a device, FIFO or socket"


def _valid(path: AnyPath) -> Path:
    if "\0" in os.fspath(path):
        _refuse(path, "the path is not valid", "a NUL character", "a path", "choose another name")
    return Path(path)


def _check_parent(folder: Path) -> None:
    """Raise what the operating system would raise at the first write."""
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _check_apart(given: Path, target: Path, inputs: Iterable[AnyPath]) -> None:
    """Refuse a destination that is, holds or lies in an input. Files are compared by number, as names may differ."""
    own, above = _number(target), {_number(folder) for folder in target.parents}
    for path in inputs:
        for real in _real_paths(Path(path)):
            if own is not None and own in {_number(place) for place in (real, *real.parents)}:
                _refuse(given, "the output would replace an input of this command", str(path), "a place outside it")
            if _number(real) in above:
                _refuse(given, "the output lies in a folder that this command reads", str(path), "a place outside it")


def _real_paths(path: Path) -> Iterator[Path]:
    """Yield where an input really is and, if it is a folder, what the links in it lead to; nothing if it is missing."""
    real = Path(os.path.realpath(path))
    if _number(real) is None:
        return
    yield real
    if real.is_dir():
        with os.scandir(real) as entries:
            yield from (Path(os.path.realpath(entry.path)) for entry in entries if entry.is_symlink())


def _number(path: Path) -> tuple[int, int] | None:
    """Return the numbers of the device and of the file, which are the same under every name; None if it is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _refuse(path: AnyPath, problem: str, got: str, wanted: str, fix: str = "choose another place") -> NoReturn:
    raise OutputError(problem, field=os.fspath(path), got=got, wanted=wanted, fix=fix)

"""This module checks the names of files in a model folder, and where those files really are. It opens no file.

ONNX Runtime follows every path in a graph and every link. So these checks run before it does.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ModelFormatError, UnsafePathError

REEXPORT = "export the model again with tp-export, or copy the whole folder again"

# Both path separators, and the colon, which marks a drive or an NTFS stream.
_NOT_PLAIN = frozenset("/\\:")


def check_name(name: str, field: str) -> None:
    """Check that a name is a plain file name, which means the same file of one folder on every system.

    Args:
        name: the name as it is written in some file.
        field: the field of that file that holds the name, for the error.

    Raises:
        UnsafePathError: the name is an absolute path, has a drive, is a UNC path, or contains a folder, `..`, NUL or
            another control character.
    """
    # Not printable are NUL and other control characters, and the surrogates that no file system call accepts.
    if name in ("", ".", "..") or not _NOT_PLAIN.isdisjoint(name) or not name.isprintable():
        raise UnsafePathError(
            "the name is not a plain name of a file in the model folder",
            field=field,
            got=ascii(name),
            wanted="a name without folders, drives, '..', backslashes and control characters",
            fix="do not use this folder unless you trust its source; export the model again with tp-export",
        )


def checked_file(root: Path, name: str) -> Path:
    """Find a file of the model folder without opening it.

    Args:
        root: the path of the model folder, resolved.
        name: the file's name.

    Returns:
        The file's real path: in the folder, or in the blobs of the Hugging Face snapshot that the folder belongs to.

    Raises:
        ModelFormatError: there is no such file.
        UnsafePathError: the name is not plain, or the file resolves to a path outside the folder, has a second hard
            link, or is not a regular file.
        PermissionError: the operating system does not permit finding the file.
    """
    check_name(name, "file name")
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        status = os.stat(real)
    except FileNotFoundError as error:
        raise ModelFormatError(
            "the file is missing from the model folder", field=name, wanted=root / name, fix=REEXPORT
        ) from error
    except PermissionError:
        raise
    except OSError as error:  # a loop of links, or a link through something that is not a folder
        raise UnsafePathError("the path of the file cannot be resolved", field=name, got=error, fix=REEXPORT) from error
    blobs = _hub_blobs(root)
    in_blobs = blobs is not None and real.parent == blobs
    if not in_blobs and not real.is_relative_to(root):
        raise UnsafePathError(
            "the file resolves outside the model folder",
            field=name,
            got=real,
            wanted=f"a file in {root}",
            fix="if you trust the file that the link points to, replace the link with that file",
        )
    # This check comes before anything opens the file: opening a FIFO blocks, and reading a device may never end.
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePathError(
            "the file is not a regular file", field=name, got=_kind(status.st_mode), wanted="a file", fix=REEXPORT
        )
    # Through a second name elsewhere the weights can be changed during use. The hub's cache may hard-link its blobs.
    if status.st_nlink > 1 and not in_blobs:
        raise UnsafePathError(
            "the file has more than one hard link, so it can be changed from outside the model folder",
            field=name,
            got=f"{status.st_nlink} links",
            wanted="1 link",
            fix="copy the folder, which makes new files (cp -r)",
        )
    return real


def _hub_blobs(root: Path) -> Path | None:
    """Return the blobs folder if `root` is a snapshot or lies in one: models--x/snapshots/<revision>[/...]."""
    for revision in (root, *root.parents):
        snapshots = revision.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return snapshots.parent / "blobs"
    return None


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISFIFO(mode):
        return "FIFO"
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device"

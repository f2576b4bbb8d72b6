"""Names of files in a model folder, and where those files really are. Opens nothing.

ONNX Runtime follows whatever path a graph or a link gives it; these checks come first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ModelFormatError, UnsafePathError

REEXPORT = "export the model again with tp-export, or copy the whole folder again"

# Both separators, and the colon of a drive or of an NTFS stream.
_NOT_PLAIN = frozenset("/\\:")


def check_name(name: str, field: str) -> None:
    """Accepts a plain file name, one that means the same file of one folder on every system.

    Args:
        name: the name as some file spells it.
        field: who spells it, for the error.

    Raises:
        UnsafePathError: an absolute path, a drive or UNC, a folder, `..`, NUL or another control character.
    """
    # Not printable: NUL and other controls, and the surrogates that no file system call accepts.
    if name in ("", ".", "..") or not _NOT_PLAIN.isdisjoint(name) or not name.isprintable():
        raise UnsafePathError(
            "is not a plain name of a file in the model folder",
            field=field,
            got=ascii(name),
            wanted="a name without folders, drives, '..', backslashes and control characters",
            fix="do not use this folder unless you trust its source; export the model again with tp-export",
        )


def checked_file(root: Path, name: str) -> Path:
    """Finds a file of the model folder without opening it.

    Args:
        root: the model folder, resolved.
        name: the file's name.

    Returns:
        Where it really is: in the folder, or in the blobs of the Hugging Face snapshot the folder belongs to.

    Raises:
        ModelFormatError: there is no such file.
        UnsafePathError: the name is not plain, or the file resolves outside, has a second hard link, or is
            not a regular file.
        PermissionError: the operating system will not say.
    """
    check_name(name, "file name")
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        status = os.stat(real)
    except FileNotFoundError as error:
        raise ModelFormatError(
            "file is missing from the model folder", field=name, wanted=root / name, fix=REEXPORT
        ) from error
    except PermissionError:
        raise
    except OSError as error:  # a loop of links, or a link through something that is no folder
        raise UnsafePathError("cannot be resolved", field=name, got=error, fix=REEXPORT) from error
    blobs = _hub_blobs(root)
    in_blobs = blobs is not None and real.parent == blobs
    if not in_blobs and not real.is_relative_to(root):
        raise UnsafePathError(
            "resolves outside the model folder",
            field=name,
            got=real,
            wanted=f"a file in {root}",
            fix="replace the link by the file it points to, if you trust that file",
        )
    # Before anything opens it: opening a FIFO blocks, reading a device may never end.
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePathError(
            "is not a regular file", field=name, got=_kind(status.st_mode), wanted="a file", fix=REEXPORT
        )
    # A second name elsewhere can change the weights under us. The hub's cache may share its blobs that way.
    if status.st_nlink > 1 and not in_blobs:
        raise UnsafePathError(
            "has more than one hard link, so it can be changed from outside the model folder",
            field=name,
            got=f"{status.st_nlink} links",
            wanted="1 link",
            fix="copy the folder (cp -r makes new files)",
        )
    return real


def _hub_blobs(root: Path) -> Path | None:
    """The blobs folder if `root` is, or is inside, a snapshot: models--x/snapshots/<revision>[/...]."""
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

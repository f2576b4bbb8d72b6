"""The record, outside a model folder, that a prepared graph was made on this machine.

`prepare` writes one for each graph that it prepares: a file in the user's own folder, named after the SHA-256 of
prepared.json. prepared.json holds the digests of the prepared files, the machine and the digest of the model's graph.
So the record vouches for all of them, wherever the model folder is moved to, and no longer after any change. A folder
that was copied from another machine has no record here.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from ..storage import ANY_FILE, UnreadableFileError, atomic_file, read_regular, user_folder

_SUFFIX = ".json"


def write_record(manifest: bytes) -> None:
    """Record that a graph was prepared here.

    Args:
        manifest: the bytes of its prepared.json.

    Raises:
        OSError: the record cannot be written.
    """
    folder = _records()
    folder.mkdir(parents=True, exist_ok=True)
    # A file of this name can only be an earlier record of the same bytes, or a damaged one.
    with atomic_file(_path(folder, manifest), replaces=ANY_FILE) as temporary:
        temporary.write_bytes(manifest)


def require_writable() -> None:
    """Check that a record can be written.

    Raises:
        OSError: the user has no home directory, or the folder of the records cannot be created or written.
    """
    folder = _records()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        problem = "the record of prepared graphs cannot be written; set TP_HOME to a folder that can be"
        raise PermissionError(errno.EACCES, problem, str(folder))


def why_not_made_here(manifest: bytes) -> str | None:
    """Return why a graph does not count as prepared here; None if there is a record that it was.

    Args:
        manifest: the bytes of its prepared.json.
    """
    try:
        record = read_regular(_path(_records(), manifest), len(manifest))
    except FileNotFoundError as error:
        return "there is no record that it was made on this machine" if error.filename else str(error)
    except (OSError, UnreadableFileError) as error:
        return f"the record that it was made on this machine cannot be read ({error})"
    return None if record == manifest else "the record that it was made on this machine is damaged"


def _records() -> Path:
    return user_folder("prepared")


def _path(folder: Path, manifest: bytes) -> Path:
    return folder / (hashlib.sha256(manifest).hexdigest() + _SUFFIX)

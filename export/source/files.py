"""Reading the files of a base model's folder, with errors that name the file: only regular files, and never a FIFO.

A link may lead out of the folder, because the snapshots of the hub's cache are links.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import MAX_JSON_BYTES, UnreadableFileError, open_regular, read_json_object, read_regular

_FIX = "fetch the model again"


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading; it is closed at the end of the block.

    Raises:
        ModelFormatError: there is no such file, it cannot be opened, or it is a folder, a FIFO or a device.
    """
    with _named(path), open_regular(path) as handle:
        yield handle


def read_file(path: Path) -> bytes:
    """Return the bytes of a file, which may be as large as a JSON file (MAX_JSON_BYTES).

    Raises:
        ModelFormatError: the file is missing, is not a regular file, is too large, or cannot be read.
    """
    with _named(path):
        return read_regular(path, MAX_JSON_BYTES)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that Hugging Face's tools wrote.

    Raises:
        ModelFormatError: the file is missing, is not a regular file, is too large, or does not hold a JSON object.
    """
    return read_json_object(path, ModelFormatError, _FIX, lenient=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableFileError as error:
        raise ModelFormatError(
            error.problem, field=str(path), got=error.got, wanted=error.wanted, fix="put the file itself there"
        ) from error
    except OSError as error:
        raise ModelFormatError("the file cannot be opened", field=str(path), got=error.strerror, fix=_FIX) from error

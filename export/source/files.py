"""Reading the files of a base model's folder: only regular files, and JSON only up to a size.

Opening a FIFO waits for a writer for ever, and a device may never end. A link may lead out of the folder, because the
snapshots of the hub's cache are links.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import read_json_object

# The largest tokenizer.json in use has 40 MB. A file at the limit takes seconds to parse.
_MAX_JSON = 128 * 2**20


def require_regular_file(path: Path) -> Path:
    """Return `path`.

    Raises:
        ModelFormatError: there is no such file, it cannot be found, or it is a folder, a FIFO or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelFormatError(
            "the file cannot be opened", field=str(path), got=error.strerror, fix="fetch the model again"
        ) from error
    if not stat.S_ISREG(mode):
        raise ModelFormatError(
            "the file is not a regular file",
            field=str(path),
            got=stat.filemode(mode),
            wanted="a file",
            fix="put the file itself there",
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that Hugging Face's tools wrote.

    Raises:
        ModelFormatError: the file is missing, is not a regular file, is too large, or does not hold a JSON object.
    """
    size = require_regular_file(path).stat().st_size
    if size > _MAX_JSON:
        raise ModelFormatError(
            "the file is too large", field=str(path), got=f"{size} bytes", wanted=f"at most {_MAX_JSON} bytes"
        )
    return read_json_object(path, ModelFormatError, "fetch the model again", lenient=True)

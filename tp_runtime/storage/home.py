"""This module finds the folder for files that belong to the user and not to a model folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def user_folder(*parts: str) -> Path:
    """Return a folder for this user's files outside any model folder: below `$TP_HOME` or ~/.cache/tp-runtime.

    Raises:
        FileNotFoundError: `TP_HOME` is not set, and the user has no home directory.
    """
    home = os.environ.get("TP_HOME") or "~/.cache/tp-runtime"
    try:
        return Path(home).expanduser().joinpath(*parts)
    except RuntimeError as error:
        raise FileNotFoundError(
            errno.ENOENT, "there is no home directory; set the environment variable TP_HOME to a folder", home
        ) from error

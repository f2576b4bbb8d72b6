"""The import of llguidance, on first use: a runtime without constraints does not need it."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import RequestError, library_text


def llguidance(field: str) -> ModuleType:
    """Return the package llguidance.

    Args:
        field: the argument that needs it, for the error.

    Raises:
        RequestError: the package is not installed or cannot be loaded.
    """
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise RequestError(
            "constrained output needs the package llguidance",
            field=field,
            got=library_text(error),
            fix='run: pip install "tp-runtime[grammar]"',
        ) from error

"""The files of a base model that state what its users may do and whom to name. An export takes them along."""

from __future__ import annotations

import re
from pathlib import Path

from tp_runtime.storage import check_name

_WORDS = (
    *("licence", "license", "licences", "licenses", "unlicence", "un-licence", "unlicense", "un-license"),
    *("notice", "notices", "copying", "copyright", "patents", "terms", "use policy", "use-policy", "use_policy"),
    *("attribution", "attributions"),
)
# A word stands alone, or is set off by anything but a letter or digit, as in "GEMMA_TERMS" and "Third-Party-Notices".
_NAME = re.compile(rf"(.*[\W_])?({'|'.join(_WORDS)})([\W_].*)?", re.IGNORECASE | re.DOTALL)


def licence_patterns() -> list[str]:
    """Return glob patterns of the names that `licence_files` finds, and of a few more, in any case of letters."""
    return ["*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in word) + "*" for word in _WORDS]


def licence_files(path: Path) -> list[str]:
    """Return the names of the files in a folder that state the licence, in order of name.

    Args:
        path: the folder.

    Raises:
        UnsafePathError: one has a name that a model folder cannot list.
    """
    found = sorted(file.name for file in path.iterdir() if _NAME.fullmatch(file.name) and file.is_file())
    for name in found:
        check_name(name, "file name")
    return found

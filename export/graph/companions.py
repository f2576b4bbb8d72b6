"""The files of a source that go into an exported folder beside the graph: configs, tokenizer, and licences."""

from __future__ import annotations

import re
from pathlib import Path

from tp_runtime.storage import check_name

from ..source import Source, read_file

_CONFIGS = ("config.json", "generation_config.json")
# The words in the names of files that state what a user of the model may do and whom to name, with any ending. A word
# stands alone, or is set off by anything but a letter or digit, as in "GEMMA_TERMS" and "Third-Party-Notices".
_WORDS = "un-?licen[cs]e|licen[cs]es?|notices?|copying|copyright|patents|terms|use[-_ ]policy|attributions?"
_LICENCE = re.compile(rf"(.*[\W_])?({_WORDS})([\W_].*)?", re.IGNORECASE | re.DOTALL)


def companion_files(source: Source) -> dict[str, bytes]:
    """Return the content of each file to write beside the graph, by name.

    The tokenizer's files are the ones that give the ids of transformers (source/tokenizer.py). The others are copies.

    Args:
        source: the model to export.

    Raises:
        ModelFormatError: a file cannot be read.
        UnsafePathError: a licence has a name that a model folder cannot list.
    """
    names = [name for name in _CONFIGS if (source.path / name).is_file()] + licence_files(source.path)
    return {name: read_file(source.path / name) for name in names} | dict(source.tokenizer.files)


def licence_files(path: Path) -> list[str]:
    """Return the names of the files in a folder that state the licence, in order of name.

    Args:
        path: the folder.

    Raises:
        UnsafePathError: one has a name that a model folder cannot list.
    """
    found = sorted(file.name for file in path.iterdir() if _LICENCE.fullmatch(file.name) and file.is_file())
    for name in found:
        check_name(name, "file name")
    return found

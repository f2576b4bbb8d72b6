"""The files of a source that go into an exported folder beside the graph: configs, tokenizer, and licences."""

from __future__ import annotations

from tp_runtime.text import TABLES, TOKENIZER_FILES

from ..source import Source, licence_files, read_file, tokenizer_tables

_CONFIGS = ("config.json", "generation_config.json")


def companion_files(source: Source) -> dict[str, bytes]:
    """Return the content of each file to write beside the graph, by name.

    The tokenizer's files are the ones that give the ids of transformers (source/tokenizer.py), and the tables of its
    tokenizer.json, if tables can give the same ids. The others are copies.

    Args:
        source: the model to export.

    Raises:
        ModelFormatError: a file cannot be read.
        UnsafePathError: a licence has a name that a model folder cannot list.
    """
    names = [name for name in _CONFIGS if (source.path / name).is_file()] + licence_files(source.path)
    files = {name: read_file(source.path / name) for name in names} | dict(source.tokenizer.files)
    tables = tokenizer_tables(files[TOKENIZER_FILES[0]])
    return files if tables is None else {**files, TABLES: tables}

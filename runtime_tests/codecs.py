"""The codec of a folder that no description lists, such as a source's: made of whatever tokenizer files it has."""

from __future__ import annotations

from pathlib import Path

from tp_runtime.text import TOKENIZER_FILES, Style, TextCodec


def codec_of(folder: Path, style: Style | None = None) -> TextCodec:
    """Return the codec of a folder's own files, as the edge reads them, without transformers."""
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return TextCodec.from_files(files, str(folder), style)

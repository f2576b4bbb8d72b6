"""Reads the settings of a GGUF file: the keys and values in front of its tensors, among them the tokenizer.

The gguf package reads them too, but it makes several numpy arrays for each string: a vocabulary of 262,144 tokens takes
it 10 s and 0.7 GB, and this module half a second.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

from tp_runtime.errors import ModelFormatError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# The number types of the format by their codes, as the format characters of the module struct. All are little-endian.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_TEXT = 1 << 24  # bytes; a damaged length must not fill the memory


def read_metadata(gguf: Path) -> dict[str, Any]:
    """Read the settings of a GGUF file.

    Args:
        gguf: the path of the file.

    Returns:
        The values by key: numbers, texts, booleans, and lists of these.

    Raises:
        ModelFormatError: the file is not a GGUF file of version 2 or 3, or its settings are cut off or malformed.
        OSError: the file cannot be read.
    """
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelFormatError(
                "the file is not a GGUF file", field=gguf.name, wanted="a file that begins with GGUF"
            )
        try:
            version, _tensors, count = _number(file, "I"), _number(file, "Q"), _number(file, "Q")
            if version not in _VERSIONS:
                raise ModelFormatError(
                    "the version of the GGUF file is unknown", field=gguf.name, got=version, wanted="2 or 3"
                )
            return dict(_setting(file) for _ in range(count))
        except (struct.error, ValueError, RecursionError) as error:
            raise ModelFormatError(
                "the settings of the GGUF file are damaged",
                field=gguf.name,
                got=str(error),
                fix="download the file again",
            ) from error


def _setting(file: IO[bytes]) -> tuple[str, Any]:
    key = _text(file)
    return key, _value(file, _number(file, "I"))


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    if kind not in _NUMBERS:
        raise ValueError(f"the type {kind}, which the format does not have")
    return _number(file, _NUMBERS[kind])


def _number(file: IO[bytes], form: str) -> Any:
    form = "<" + form
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _text(file: IO[bytes]) -> str:
    length = _number(file, "Q")
    content = file.read(min(length, _LONGEST_TEXT))
    if len(content) != length:
        raise ValueError(f"a text of {length} bytes, which is cut off")
    return content.decode()

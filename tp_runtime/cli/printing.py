"""What the commands print: notes on stderr, text that cannot steer a terminal, aligned columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
# Generated text has lines and tabs; everything else a terminal would act on, a model or a patch could be made to say.
_TEXT_CONTROLS = {code: shown for code, shown in _CONTROLS.items() if chr(code) not in "\n\t"}


def note(message: str) -> None:
    """A line on stderr: everything that is not the result."""
    print(message, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """One line of text from a file, with control characters spelt out."""
    return text.translate(_CONTROLS)


def emit(piece: str) -> None:
    """Print a piece of generated text at once; on a terminal, control characters are spelt out."""
    if sys.stdout is not None and sys.stdout.isatty():
        piece = piece.translate(_TEXT_CONTROLS)
    print(piece, end="", flush=True)


def print_fields(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns; a value of several lines keeps its column."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        for number, line in enumerate(value.split("\n")):
            print(f"{name if number == 0 else '':<{width}}  {printable(line)}".rstrip())


def size(count: int) -> str:
    """A number of bytes for people."""
    if count < 1000:
        return f"{count} bytes"
    scaled = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        scaled /= 1000
        if scaled < 999.95 or unit == "TB":
            break
    return f"{scaled:.1f} {unit} ({count} bytes)"


def plural(count: int, noun: str) -> str:
    """The number and the noun in the right form, for nouns that take an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def version(package: str) -> str:
    """Of an installed package; "unknown" where its source folder is on the path instead."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"

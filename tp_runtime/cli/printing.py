"""This module prints for the commands: notes on stderr, text without control characters, and aligned columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

from ..errors import printable

# Generated text keeps its newlines and tabs, and the characters with which scripts and emoji join letters. All other
# control characters are replaced, because a model or a patch could be made to produce characters that a terminal acts
# on.
_TEXT_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def note(message: str) -> None:
    """Print a line on stderr. This is for everything that is not the result."""
    print(message, file=sys.stderr, flush=True)


def emit(chunk: str) -> None:
    """Print a chunk of generated text without delay. On a terminal, control characters are printed as escape codes."""
    if sys.stdout is not None and sys.stdout.isatty():
        chunk = chunk.translate(_TEXT_CONTROLS)
    print(chunk, end="", flush=True)


def print_fields(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns. All lines of a value stay in its column."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        for number, line in enumerate(value.split("\n")):
            print(f"{name if number == 0 else '':<{width}}  {printable(line)}".rstrip())


def size(count: int) -> str:
    """Return a number of bytes in a form for people."""
    if count < 1000:
        return f"{count} bytes"
    scaled = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        scaled /= 1000
        if scaled < 999.95 or unit == "TB":
            break
    return f"{scaled:.1f} {unit} ({count} bytes)"


def plural(count: int, noun: str) -> str:
    """Return the number with the noun in the singular or plural; the plural has an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def version(package: str) -> str:
    """Return the version of an installed package, or "unknown" if only its source folder is on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"

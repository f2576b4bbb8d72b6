"""Values that an attacker, or a damaged disk, puts into a JSON file, and a check of the errors that they cause."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tp_runtime.errors import TPError


class CountedText(str):
    """A text that counts the characters of the parts that are taken out of it, by an index or a slice.

    Attributes:
        copied: the number of these characters.
    """

    copied = 0

    def __getitem__(self, place: Any) -> str:
        part = super().__getitem__(place)
        self.copied += len(part)
        return part


# Texts of JSON values. Some are no JSON, some are JSON that Python cannot hold or print, and some are only unusual.
NUMBERS = (
    *("9" * 5000, "-" + "9" * 4000, "1e400", "-1e400", "0." + "1" * 5000, "-0", "1e5", "1.5", "NaN", "-Infinity"),
    *("2147483648", "9223372036854775808", "18446744073709551616", "-1"),
)
TEXTS = (
    *(r'"\ud800"', r'"\udfffx"', r'"\ud83d\ude00"', r'"\u0000"', r'"\u001b[2J"', r'"\u202egnp.exe"', r'"a\nerror: b"'),
    *('""', '"' + "x" * 100_000 + '"', '"../../x"', '"é日本"'),
)
OTHERS = (
    *("null", "true", "[]", "{}", "[[]]", "[0]", "[0,0,0]", "[4294967296,1073741824,0]"),
    *('[{"name":[]}]', '{"a":1,"a":2}', "[" * 100_000, "[" * 600 + "]" * 600, '{"a":' * 400 + "1" + "}" * 400),
    *("[" + "0," * 50_000 + "0]", ""),
)
FRAGMENTS = (*NUMBERS, *TEXTS, *OTHERS)
KEYS = (r'"\ud800"', r'"\u0000"', r'"\u001b[2J"', '""', '"' + "k" * 100_000 + '"', '"__proto__"')
_MARK = "\x00the place of the fragment\x00"


def some_variants(document: Any, count: int) -> Iterator[tuple[str, str]]:
    """Yield at most `count` texts of the document with one hostile value or one hostile key, always the same ones.

    Yields:
        What was changed, and the JSON text.
    """
    for index, key in enumerate(KEYS):
        yield f"key {index}", json.dumps({**document, _MARK: 1}).replace(json.dumps(_MARK), key)
    changes = [(place, index) for place in _places(document) for index in range(len(FRAGMENTS))]
    for place, index in random.Random(0).sample(changes, min(count - len(KEYS), len(changes))):
        yield f"{place} = fragment {index}", _with(document, place, FRAGMENTS[index])


def check_error(error: TPError, what: str) -> None:
    """Assert that a terminal and a log can print the text of the error."""
    text = str(error)
    assert len(text) < 7000, what
    assert all(line.isprintable() for line in text.split("\n")), what


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in the document, and of the first items of every list."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _with(document: Any, path: tuple[Any, ...], fragment: str) -> str:
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = _MARK
    return json.dumps(changed).replace(json.dumps(_MARK), fragment)

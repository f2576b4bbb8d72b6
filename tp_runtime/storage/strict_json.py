"""The JSON reader of this project: it parses every file and every header that holds JSON.

Python's own reader takes the last of two equal keys and accepts NaN, so two readers of one file could find different
values. This reader refuses both, except in files that Hugging Face's tools wrote (`lenient`). It always refuses text
that is not UTF-8 or holds half of a surrogate pair, numbers that are too long to convert, and nesting that is too deep
for the stack.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from ..errors import TPError
from .regular_file import UnreadableFileError, read_regular

# The largest file of JSON that is read. The largest tokenizers of today have 35 MB.
MAX_JSON_BYTES = 2**28

# A JSON escape for one half of a surrogate pair. Only such escapes can put half a pair into a parsed text.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


class StrictJSONError(ValueError):
    """The text is not JSON of the expected form.

    Attributes:
        problem: a clause to put after the name of what was read, such as "is not valid JSON".
        got: the value that was found.
        wanted: the values that would have been accepted.
    """

    def __init__(self, problem: str, got: object, wanted: str) -> None:
        super().__init__(f"{problem}; got {got}")
        self.problem, self.got, self.wanted = problem, got, wanted


def parse_json(raw: bytes | str, *, lenient: bool = False) -> Any:
    """Parse JSON text.

    Args:
        raw: the text, or its UTF-8 bytes.
        lenient: whether to accept duplicate keys (the last one counts), NaN and Infinity, as Hugging Face's tools do.
            This is for files that those tools made. Formats of this project are always read strictly.

    Raises:
        StrictJSONError: the text is not valid JSON or not valid Unicode, or holds a duplicate key or a number that JSON
            does not have or that is too large.
    """
    strict = {} if lenient else {"object_pairs_hook": _unique, "parse_constant": _refuse, "parse_float": _finite}
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(text, **strict)  # type: ignore[arg-type]
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except StrictJSONError:
        raise
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise StrictJSONError("holds half of a surrogate pair", found, "text that is valid Unicode") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a 5,000-digit number, nesting too deep
        raise StrictJSONError("is not valid JSON", str(error), "one JSON object") from error
    return value


def parse_json_object(raw: bytes | str, *, lenient: bool = False) -> dict[str, Any]:
    """Parse a JSON object. The arguments are those of `parse_json`.

    Raises:
        StrictJSONError: as for `parse_json`; or the text is a JSON value other than an object.
    """
    value = parse_json(raw, lenient=lenient)
    if not isinstance(value, dict):
        raise StrictJSONError("is not a JSON object", type(value).__name__, "one JSON object")
    return value


def read_json_object(path: Path, error: type[TPError], fix: str, *, lenient: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        error: the class of the error to raise; it names the file as the field at fault.
        fix: an instruction that tells the user what to do about a bad file.
        lenient: see `parse_json`.

    Raises:
        TPError: the file is missing, is not a regular file, is too large, cannot be read, or does not hold a JSON
            object; the class is `error`.
    """
    try:
        return parse_json_object(read_regular(path, MAX_JSON_BYTES), lenient=lenient)
    except FileNotFoundError:
        raise error("the file is missing", field=str(path), got="no file", wanted="a JSON object", fix=fix) from None
    except UnreadableFileError as problem:
        raise error(problem.problem, field=str(path), got=problem.got, wanted=problem.wanted, fix=fix) from None
    except OSError as problem:
        raise error("the file cannot be read", field=str(path), got=problem, wanted="a JSON object", fix=fix) from None
    except StrictJSONError as problem:
        raise error(
            f"the file {problem.problem}", field=str(path), got=problem.got, wanted=problem.wanted, fix=fix
        ) from problem


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StrictJSONError("holds a duplicate key", ascii(duplicate), "every key once")
    return found


def _refuse(text: str) -> NoReturn:
    raise StrictJSONError("holds a number that JSON does not have", text, "finite numbers")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise StrictJSONError("holds a number that is too large", f"{text:.40}", "finite numbers")
    return value

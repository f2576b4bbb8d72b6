"""Readers of calls whose arguments are JSON: between markers, after a name, or as the whole answer.

A reader gets a text and the index at which calls begin, and returns the calls and the index of their end. What is
malformed raises one of MALFORMED, most often ValueError, as the json module does; `parse_tool_calls` then leaves it in
the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MALFORMED = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
"""What readers raise for malformed text; the ast module raises all but the first."""

DEEPEST = 48
"""Levels of lists and objects in the arguments of a call: a list of messages has at most 64, and holds the call."""

Parameters = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the arguments of each tool, by its name."""


@dataclass(frozen=True)
class FoundCall:
    """A call as a model wrote it.

    Attributes:
        name: the name of the tool.
        arguments: its arguments by name.
        id: the id that the model wrote; None if it wrote none.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


Reader = Callable[[str, int, Parameters], tuple[list[FoundCall], int]]


def json_at(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that begins at an index, after spaces, and the index of its end.

    Raises:
        ValueError: there is no JSON value, or it has a number that is not finite or text that is not valid Unicode.
        RecursionError: it is nested too deep.
    """
    value, end = _DECODER.raw_decode(text, past_spaces(text, at))
    check_json(value)  # an escape can name half of a surrogate pair
    return value, end


def whole_json(text: str) -> Any:
    """Return the JSON value that a text states, with nothing but spaces around it.

    Raises:
        ValueError, RecursionError: as for `json_at`; or something follows the value.
    """
    value, end = json_at(text, 0)
    if past_spaces(text, end) < len(text):
        raise ValueError("something follows the JSON value")
    return value


def check_json(value: object) -> None:
    """Check that a value of plain Python types is one of JSON: finite numbers, and text that is valid Unicode.

    Raises:
        ValueError, TypeError, RecursionError: the value is something else.
    """
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def call_of(value: object) -> FoundCall:
    """Return the call that a JSON object states.

    Raises:
        ValueError: the value is no call, or its arguments are nested deeper than a chat's messages can be.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = {"id": value.get("id"), **value["function"]}
    if not isinstance(value, dict):
        raise ValueError("a call is not an object")
    name = value.get("name", value.get("tool_name"))
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = whole_json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call has no name or no arguments")
    _check_depth(arguments, DEEPEST)
    given = value.get("id", value.get("tool_call_id"))
    return FoundCall(name, arguments, given if isinstance(given, str) and given else None)


def calls_of(value: object) -> list[FoundCall]:
    """Return the calls that a JSON value states, an object or a list of objects.

    Raises:
        ValueError: the value is no call, or a list without any.
    """
    calls = [call_of(item) for item in (value if isinstance(value, list) else [value])]
    if not calls:
        raise ValueError("the list has no calls")
    return calls


def json_between(opening: str, closing: str = "") -> Reader:
    """Return the reader of JSON between two markers: calls, or lists of calls."""

    def read(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
        value, end = json_at(text, text.index(opening, at) + len(opening))
        calls = calls_of(value)
        while closing and text.startswith(("{", "["), past_spaces(text, end)):
            value, end = json_at(text, end)
            calls += calls_of(value)
        return calls, past(text, end, closing)

    return read


def json_after_name(opening: str, middle: str, closing: str = "", section: str = "", section_end: str = "") -> Reader:
    """Return the reader of calls whose names stand between two markers in front of the JSON of their arguments.

    Args:
        opening: the marker in front of a name.
        middle: the marker after the name.
        closing: the marker after the arguments.
        section: the marker in front of all calls.
        section_end: the marker after all calls.
    """

    def read(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
        calls, end = [], at + len(section)
        while text.startswith(opening, start := past_spaces(text, end)):
            name_end = text.index(middle, start + len(opening))
            name, _, given = text[start + len(opening) : name_end].partition("[CALL_ID]")
            arguments, end = json_at(text, name_end + len(middle))
            calls.append(call_of({"name": name.strip(), "arguments": arguments, "id": given.strip()}))
            end = past(text, end, closing)
        if not calls:
            raise ValueError("the section has no calls")
        return calls, past(text, end, section_end)

    return read


def whole_answer(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
    """Read an answer that is nothing but calls as JSON, with ";" or spaces between them.

    Because no marker tells such calls from an answer in JSON, they must name tools of the request.

    Raises:
        ValueError: the answer is something else.
    """
    calls, end = [], past_spaces(text, at)
    while end < len(text):
        value, end = json_at(text, end)
        if isinstance(value, dict) and not {"arguments", "parameters", "function"} & value.keys():
            raise ValueError("the object is no call")
        calls += calls_of(value)
        end = past_spaces(text, end)
        if text.startswith(";", end):
            end = past_spaces(text, end + 1)
    if not calls or any(call.name not in parameters for call in calls):
        raise ValueError("the answer is no call of these tools")
    return calls, end


def past_spaces(text: str, at: int) -> int:
    """Return the index of the next character that is no space."""
    found = _SPACES.match(text, at)
    return at if found is None else found.end()


def past(text: str, at: int, closing: str) -> int:
    """Return the index after spaces and a closing marker.

    The marker may be missing at the end of the text, because it can be the token that ended the completion.

    Raises:
        ValueError: something else follows.
    """
    if not closing:
        return at
    end = past_spaces(text, at)
    if text.startswith(closing, end):
        return end + len(closing)
    if end < len(text):
        raise ValueError(f"{closing} is missing")
    return end


def _check_depth(value: object, left: int) -> None:
    if left < 0:
        raise ValueError("the arguments are nested too deep")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, left - 1)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# A small model writes line breaks into strings, which `strict` would refuse.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)
_SPACES = re.compile(r"\s*")

"""Values that a caller passes for a chat template: this module checks them and copies them to plain Python values.

A template prints, compares and converts what it gets, so a value must be what JSON can say. The copy holds only the
types dict, list, str, int, float, bool and None: what the caller changes later, and the methods of a caller's own
classes, never reach a template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, shown

_DEEPEST = 64  # levels of lists and objects; jinja2 and json recurse, and no schema in use comes close
_MOST_VALUES = 1 << 18  # of one argument; a list that holds another one twice, many times over, has endless values


def plain_value(value: object, field: str) -> Any:
    """Return a copy of a value, made of plain Python types. The order of keys stays.

    Args:
        value: a value of JSON; a mapping stands for an object, and a list or tuple for an array.
        field: the path of the value in the request, for errors.

    Raises:
        RequestError: the value, or a value or key within it, is not one of JSON or not valid Unicode; it is nested too
            deep or contains itself; or there are too many values. The error names the path.
    """
    return _Copy(field).of(value, field, 0)


def plain_object(value: object, field: str, wanted: str) -> dict[str, Any]:
    """Return a copy of an object, as `plain_value` does.

    Raises:
        RequestError: the value is not an object, or as for `plain_value`.
    """
    if not isinstance(value, Mapping):
        raise RequestError("the value is not an object", field=field, got=shown(value), wanted=wanted)
    copy: dict[str, Any] = plain_value(value, field)
    return copy


def plain_objects(values: object, field: str, wanted: str) -> list[dict[str, Any]]:
    """Return copies of a list of objects, as `plain_value` does.

    Raises:
        RequestError: the value is not a list of objects, or as for `plain_value`.
    """
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise RequestError("the value is not a list", field=field, got=shown(values), wanted=wanted)
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError("the value is not an object", field=f"{field}[{i}]", got=shown(value), wanted=wanted)
    copies: list[dict[str, Any]] = plain_value(values, field)
    return copies


def check_unicode(text: str, field: str) -> str:
    """Return the text as a plain str.

    Raises:
        RequestError: the text holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "the text is not valid Unicode", field=field, got=repr(text[error.start]), wanted="no lone surrogates"
        ) from None
    # A member of an enum of strings prints as its name in a template, and not as its text.
    return text if type(text) is str else str.__str__(text)


class _Copy:
    """One copy in progress, which counts its values."""

    def __init__(self, field: str) -> None:
        self._field, self._left = field, _MOST_VALUES

    def of(self, value: object, path: str, depth: int) -> Any:
        """Return the copy of a value that lies `depth` levels deep at `path`."""
        self._left -= 1
        if self._left < 0:
            raise RequestError("the value is too large", field=self._field, wanted=f"at most {_MOST_VALUES} values")
        if isinstance(value, str):
            return check_unicode(value, path)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise RequestError("the number is not finite", field=path, got=shown(value), wanted="a number of JSON")
            return float(value)
        if depth >= _DEEPEST:
            raise RequestError("the value is nested too deep", field=path, wanted=f"at most {_DEEPEST} levels")
        if isinstance(value, Mapping):
            return self._of_mapping(value, path, depth)
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return [self.of(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        raise RequestError(
            "the value is not one of JSON",
            field=path,
            got=type(value).__name__,
            wanted="an object, a list, text, a number, True, False or None",
        )

    def _of_mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        copy: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise RequestError("the key is not a string", field=path, got=shown(key), wanted="str")
            name = check_unicode(key, path)
            copy[name] = self.of(item, f"{path}.{name}", depth + 1)
        return copy

"""Random JSON schemas of ten kinds, each with an instruction: what public suites have and applications ask for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("name", "title", "city", "colour", "status", "price", "count", "email", "notes", "owner", "kind", "size")
_VALUES = ("red", "green", "blue", "small", "large", "open", "closed", "draft", "done", "low", "high", "none")
_UNICODE = (
    "größe",
    "naïve",
    "цена",
    "名前",
    "κωδικός",
    "señal",
    "emoji 🙂",
    "a b",
    'quote"d',
    "back\\slash",
    "tab\tkey",
)
_PATTERNS = (
    "^[A-Z]{3}-[0-9]{4}$",
    "^#[0-9a-fA-F]{6}$",
    r"^\d{3}-\d{2}-\d{4}$",
    "^(yes|no|maybe)( please)?$",
    r"^v\d+\.\d+\.\d+$",
    "[aeiou]{2}",
    r"^[^@\s]{1,12}@[a-z]{1,10}\.(com|org)$",
    r"^\+?[1-9]\d{7,11}$",
)
_FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def _words(draw: random.Random, count: int) -> list[str]:
    return draw.sample(_WORDS, count)


def _scalar(draw: random.Random) -> Schema:
    """Return the schema of a value without parts."""
    choices: tuple[Schema, ...] = (
        {"type": "string"},
        {"type": "string", "maxLength": draw.choice((8, 20, 60))},
        {"type": "integer"},
        {"type": "number"},
        {"type": "boolean"},
        {"type": ["string", "null"]},
        {"enum": draw.sample(_VALUES, 3)},
    )
    return dict(draw.choice(choices))


def _objects(draw: random.Random) -> Schema:
    names = _words(draw, draw.randint(1, 5))
    schema: Schema = {"type": "object", "properties": {name: _scalar(draw) for name in names}}
    schema["required"] = draw.sample(names, draw.randint(0, len(names)))
    if draw.random() < 0.7:
        schema["additionalProperties"] = False
    elif draw.random() < 0.5:
        schema["additionalProperties"] = {"type": "integer"}
    if draw.random() < 0.3:
        schema["properties"]["inner"] = _objects(draw)
    return schema


def _arrays(draw: random.Random) -> Schema:
    schema: Schema = {"type": "array", "items": _scalar(draw)}
    if draw.random() < 0.4:
        schema["prefixItems"] = [_scalar(draw) for _ in range(draw.randint(1, 3))]
        schema["items"] = draw.choice((False, {"type": "integer"}))
        schema["minItems"] = draw.randint(0, len(schema["prefixItems"]))
    else:
        schema["minItems"] = draw.randint(0, 3)
        schema["maxItems"] = schema["minItems"] + draw.randint(1, 4)
    return schema


def _enums(draw: random.Random) -> Schema:
    values: list[Any] = [
        *draw.sample(_VALUES, 3),
        draw.randint(-5, 5),
        None,
        True,
        {"a": 1, "b": ["x"]},
        [1, "two"],
        2.5,
    ]
    return {"enum": draw.sample(values, draw.randint(2, len(values)))}


def _unions(draw: random.Random) -> Schema:
    if draw.random() < 0.5:
        return {"anyOf": [_scalar(draw), _objects(draw), _arrays(draw)]}
    options = []
    for tag in draw.sample(_VALUES, draw.randint(2, 3)):
        name = draw.choice(_WORDS)
        properties = {"type": {"const": tag}, name: _scalar(draw)}
        options.append(
            {"type": "object", "properties": properties, "required": ["type", name], "additionalProperties": False}
        )
    return {"oneOf": options}


def _consts(draw: random.Random) -> Schema:
    value = draw.choice(
        (1, -2.5, True, None, "a fixed text", 'with "quotes"', ["x", 1], {"k": {"n": None}}, "日本", "")
    )
    return {
        "type": "object",
        "properties": {"version": {"const": value}, draw.choice(_WORDS): _scalar(draw)},
        "required": ["version"],
        "additionalProperties": False,
    }


def _patterns(draw: random.Random) -> Schema:
    parts = {name: {"type": "string", "pattern": draw.choice(_PATTERNS)} for name in _words(draw, draw.randint(1, 3))}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _formats(draw: random.Random) -> Schema:
    parts = {name: {"type": "string", "format": draw.choice(_FORMATS)} for name in _words(draw, draw.randint(1, 3))}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _recursions(draw: random.Random) -> Schema:
    node: Schema = {
        "type": "object",
        "properties": {
            draw.choice(_WORDS): _scalar(draw),
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": draw.randint(1, 2)},
        },
        "required": ["children"],
        "additionalProperties": False,
    }
    if draw.random() < 0.3:
        node["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def _bounds(draw: random.Random) -> Schema:
    low = draw.randint(-500, 500)
    parts: Schema = {
        "whole": {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 900)},
        "above": {"type": "number", "exclusiveMinimum": low / 8, "maximum": low / 8 + draw.randint(1, 50)},
        "step": {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": draw.choice((2, 5, 7, 25))},
        "text": {"type": "string", "minLength": draw.randint(0, 4), "maxLength": draw.randint(5, 12)},
        "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": draw.randint(1, 4)},
    }
    names = draw.sample(list(parts), draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: parts[name] for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _unicode_keys(draw: random.Random) -> Schema:
    names = draw.sample(_UNICODE, draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _scalar(draw) for name in names},
        "required": names[: draw.randint(1, len(names))],
        "additionalProperties": False,
    }


KINDS: dict[str, Callable[[random.Random], Schema]] = {
    "objects": _objects,
    "arrays": _arrays,
    "enums": _enums,
    "unions": _unions,
    "const": _consts,
    "pattern": _patterns,
    "formats": _formats,
    "recursion": _recursions,
    "bounds": _bounds,
    "unicode keys": _unicode_keys,
}
"""The kinds of schema: what is typical of each, and a function that draws one."""


def random_schema(kind: str, seed: int) -> Schema:
    """Return the schema of a kind that belongs to a seed."""
    return KINDS[kind](random.Random(f"{kind} {seed}"))

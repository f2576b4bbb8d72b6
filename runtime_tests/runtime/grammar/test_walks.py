"""Whatever a model writes under a constraint and ends by itself is valid, by another implementation's judgement."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import uuid
from typing import Any
from urllib.parse import urlsplit

import pytest
from tokenizers import Tokenizer

from benchmarks.random_schemas import KINDS, random_schema
from runtime_tests.runtime.grammar.walks import Walker
from tp_runtime.grammar import Grammars

jsonschema = pytest.importorskip("jsonschema")

FORMATS = jsonschema.FormatChecker(formats=())
for name, check in {
    "date": datetime.date.fromisoformat,
    "date-time": lambda text: datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)),
    "time": lambda text: datetime.time.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "uri": lambda text: urlsplit(text).scheme or 1 / 0,
    "email": lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+", text) or 1 / 0,
    "hostname": lambda text: all(0 < len(label) < 64 for label in text.split(".")) or 1 / 0,
    "duration": lambda text: re.fullmatch(r"P(?=.)(\d+[YMWD])*(T(\d+[HMS])+)?", text) or 1 / 0,
}.items():
    FORMATS.checks(name, raises=(ValueError, ZeroDivisionError))(
        lambda value, check=check: not isinstance(value, str) or check(value) is not None
    )

# What the random schemas do not have: each is one line of a public suite or of a bug report.
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "any object": {"type": "object"},
    "names that extend each other": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "ab": {"type": "null"}},
        "additionalProperties": {"type": "string", "maxLength": 3},
        "maxProperties": 3,
        "required": ["a", "ab"],
    },
    "patterns of names": {
        "type": "object",
        "patternProperties": {"^n_": {"type": "integer"}, "^s_": {"type": "string", "maxLength": 4}},
        "additionalProperties": {"type": "null"},
        "maxProperties": 4,
    },
    "one of two optional properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "joined objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 9}, "b": {"enum": ["x", "y"]}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "joined strings": {"allOf": [{"type": "string", "minLength": 2}, {"pattern": "^[a-f]+$"}, {"maxLength": 4}]},
    "joined numbers": {
        "type": "integer",
        "allOf": [{"multipleOf": 4}, {"multipleOf": 6}, {"minimum": -90, "maximum": 90}],
    },
    "no type": {
        "minimum": 3,
        "maximum": 5,
        "maxLength": 2,
        "maxItems": 1,
        "maxProperties": 1,
        "items": {"type": "null"},
    },
    "several types": {"type": ["integer", "array", "null"], "items": {"type": "boolean"}, "maxItems": 2, "maximum": 5},
    "disjoint options": {
        "oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}, {"type": "array", "maxItems": 0}]
    },
    "old tuples": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "boolean"}],
        "additionalItems": False,
        "minItems": 1,
    },
    "two definitions in a circle": {
        "$ref": "#/$defs/a~1b",
        "$defs": {
            "a/b": {"type": "object", "properties": {"c": {"$ref": "#/$defs/c%20d"}}, "additionalProperties": False},
            "c d": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}, "maxItems": 2},
        },
    },
    "a reference to the root": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "n": {"type": "integer"}},
        "required": ["next"],
        "additionalProperties": False,
    },
    "a reference into the schema": {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
            "b": {"$ref": "#/properties/a/items"},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "an endless option": {
        "anyOf": [{"$ref": "#/$defs/endless"}, {"type": "integer"}],
        "$defs": {"endless": {"type": "object", "properties": {"x": {"$ref": "#/$defs/endless"}}, "required": ["x"]}},
    },
    "a pattern and a format": {"type": "string", "format": "date", "pattern": "^20[0-9]{2}-02-"},
    "a format among other types": {"type": ["string", "null"], "format": "time"},
    "sets of sets in Rust": {"type": "string", "pattern": "^[[a]]$|^[a&&b]+$|^[+--]$|^[^[\\]]$"},
    "classes": {"type": "string", "pattern": r"^\d{2}\D\w\W\s\S.[^\w\s][\d.-]$"},
    "escaped characters": {"type": "string", "pattern": r"^[\u00e9\t\/]\x41\.\-$"},
    "literals with quotes": {"enum": ['a"b', "a\\b", "line\nbreak", "tab\t", "é", "", "/"]},
    "fractions": {"type": "number", "minimum": 0.125, "exclusiveMaximum": 0.5},
    "negative fractions": {"type": "number", "exclusiveMinimum": -1.5, "maximum": -0.25},
    "a number across zero": {"type": "number", "minimum": -0.001, "maximum": 1000},
    "large bounds": {"type": "integer", "minimum": 999_999_999, "maximum": 9_007_199_254_740_992},
    "one bound": {"type": "integer", "exclusiveMinimum": -17},
    "whole multiples": {"type": "number", "multipleOf": 4, "minimum": -40, "maximum": 40},
}


def is_valid(schema: dict[str, Any], value: Any) -> bool:
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(validator(schema, format_checker=FORMATS).is_valid(value))


def walk_and_validate(
    schema: dict[str, Any], walks: int, grammars: Grammars, tokenizer: Tokenizer, walker: Walker
) -> int:
    """Walk several times, check every completion that ended by itself, and return how many did."""
    grammar = grammars.compile(json_schema=schema)
    ended = 0
    for _ in range(walks):
        ids, by_itself = walker.walk(grammar.constraint())
        if by_itself:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert is_valid(schema, json.loads(text)), text
            ended += 1
    return ended


@pytest.mark.parametrize("kind", KINDS)
def test_every_completion_of_a_random_schema_that_ends_is_valid(
    kind: str, grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int
) -> None:
    walker = Walker(tokenizer, width, eos_ids, seed=len(kind))
    ended = sum(walk_and_validate(random_schema(kind, seed), 4, grammars, tokenizer, walker) for seed in range(15))
    assert ended > 20


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_completion_of_a_special_schema_that_ends_is_valid(
    name: str, grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int
) -> None:
    walker = Walker(tokenizer, width, eos_ids, seed=len(name))
    assert walk_and_validate(SCHEMAS[name], 15, grammars, tokenizer, walker) > 3


@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{1,3}",
        "^yes$|^no$",
        "(a|bc){2,3}",
        r"\d+(\.\d{1,2})?",
        "[^a-z]{3}",
        "é|日本",
        "a{2}b{2,}c{0,1}",
        r"\{x\}",
        "(?:ab)+?",
    ],
)
def test_every_completion_of_an_expression_that_ends_matches_as_a_whole(
    pattern: str, grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int
) -> None:
    walker = Walker(tokenizer, width, eos_ids, seed=len(pattern))
    grammar = grammars.compile(regex=pattern)
    ended = 0
    for _ in range(15):
        ids, by_itself = walker.walk(grammar.constraint())
        if by_itself:
            assert re.fullmatch(pattern, tokenizer.decode(ids))
            ended += 1
    assert ended > 5


def test_every_completion_of_a_grammar_that_ends_is_a_text_of_it(
    grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int
) -> None:
    lark = """
        start: "call " NAME "(" value ")"
        value: %json {
            "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false
        }
        NAME: /[a-z]{1,4}/
    """
    walker = Walker(tokenizer, width, eos_ids, seed=0)
    grammar = grammars.compile(grammar=lark)
    for _ in range(10):
        ids, by_itself = walker.walk(grammar.constraint())
        assert by_itself
        assert re.fullmatch(r'call [a-z]{1,4}\(\{"n": [12]\}\)', tokenizer.decode(ids))

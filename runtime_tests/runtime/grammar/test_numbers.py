"""Bounds of numbers, at the bound itself and beside it: what is accepted is within the bounds."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from runtime_tests.vocabularies import byte_level
from tp_runtime.errors import RequestError
from tp_runtime.grammar import Grammars

BOUNDS = (-10.5, -10, -0.125, 0, 0.001, 0.5, 1, 9.99, 10)
TEXTS = [f"{sign}{text}" for sign in ("", "-") for text in ("0", "0.0", "0.001", "0.125", "0.50", "0.501", "1", "1.0")]
TEXTS += [
    f"{sign}{text}" for sign in ("", "-") for text in ("9", "9.99", "9.991", "10", "10.0", "10.5", "10.51", "11", "99")
]
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def is_within(value: float, schema: dict[str, Any]) -> bool:
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
        and value < schema.get("exclusiveMaximum", value + 1)
        and (schema["type"] == "number" or value == int(value))
    )


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize(("lower", "upper"), list(itertools.product(LOWER, UPPER)))
def test_only_numbers_within_the_bounds_are_accepted(kind: str, lower: str, upper: str) -> None:
    tokenizer = byte_level()
    grammars = Grammars(tokenizer, [0], 512)
    compiled = 0
    for low, high in [
        *itertools.combinations(BOUNDS, 2),
        *((None, each) for each in BOUNDS),
        *((each, None) for each in BOUNDS),
    ]:
        schema: dict[str, Any] = {"type": kind, lower: low, upper: high}
        schema = {key: value for key, value in schema.items() if value is not None}
        try:
            grammar = grammars.compile(json_schema=schema)
        except RequestError:  # no whole number lies between
            assert kind == "integer"
            continue
        compiled += 1
        for text in TEXTS:
            constraint = grammar.constraint()
            try:
                constraint.follow(tokenizer.encode(text).ids)
            except RequestError:
                continue
            assert not constraint.allows(0) or is_within(json.loads(text), schema), (schema, text)
    assert compiled > 40


def test_an_exclusive_bound_beside_an_inclusive_one_keeps_both() -> None:
    tokenizer = byte_level()
    grammars = Grammars(tokenizer, [0], 512)
    schema = {"type": "number", "minimum": 0, "exclusiveMinimum": 0, "exclusiveMaximum": 2, "maximum": 1}
    grammar = grammars.compile(json_schema=schema)
    accepted = []
    for text in ("0", "0.5", "1", "1.5"):
        constraint = grammar.constraint()
        try:
            constraint.follow(tokenizer.encode(text).ids)
        except RequestError:
            continue
        accepted += [text] if constraint.allows(0) else []
    assert accepted == ["0.5", "1"]

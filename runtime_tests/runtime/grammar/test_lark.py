"""The pass over a grammar sees every rule, option and schema that llguidance sees. One budget holds for all of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime_tests.hostile import CountedText
from runtime_tests.vocabularies import byte_level
from tp_runtime.errors import RequestError
from tp_runtime.grammar import Grammars
from tp_runtime.grammar.lark import check_lark

CHAIN = "".join(f"r{at}: r{at + 1}\n" for at in range(501)) + 'r501: "b"\n'
MISSPELT = '%json {"type": "integer", "minimun": 3}'


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_level(), [0, 1], 512)


@pytest.mark.parametrize(
    "text",
    [
        f"start: r0\nx: y[r0\n{CHAIN}]",
        f"start: r0\nx[y=\n{CHAIN}]",
        f"start: /\n/ r0\n{CHAIN}x: /\n/",
        f'start: <"> r0\n{CHAIN}',
    ],
    ids=["after an optional part", "in options", "between expressions over lines", "after a special token"],
)
def test_rules_cannot_be_hidden_from_their_limit(text: str) -> None:
    with pytest.raises(RequestError, match="the grammar is too large"):
        check_lark(text, "grammar")


@pytest.mark.parametrize(
    "text",
    [
        f'start: a[{MISSPELT}]\na: "b"',
        f'start: a[/\n/ | {MISSPELT}]\na: "b"',
        f"start: /\n/ {MISSPELT} /\n/",
        f'start: <"> {MISSPELT} <">',
        f"start: <//> {MISSPELT}",
    ],
)
def test_a_schema_is_lowered_wherever_it_stands(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_lark(text, "grammar")
    assert refused.value.field == "grammar.%json[1].minimun"


@pytest.mark.parametrize(
    "options",
    [
        "[temperature=0.5]",
        " [temperature=0.5]",
        "[ temperature = 0.5 ]",
        "[suffix=/b/, temperature=0.5]",
        "[suffix=/]/,temperature=0.5]",
        '[suffix="]", max_tokens=5]',
        "[lazy, stop=/b/]",
        '[stop_capture="a", suffix="b"]',
    ],
)
def test_an_option_is_refused_however_it_is_written(options: str) -> None:
    with pytest.raises(RequestError, match="the option of a rule is not supported"):
        check_lark(f"start: x\nx{options}: /a+/", "grammar")


def test_rules_may_have_the_names_of_options(grammars: Grammars) -> None:
    grammars.compile(grammar='start: a[stop] [temperature]\na[capture, suffix="c"]: /b+/\nstop: "s"\ntemperature: "t"')


@pytest.mark.parametrize(
    "text", ['start: "a\n', "start: /a\n", 'start: "' + '\\"' * 200_000, "start: /" + "\\/" * 200_000]
)
def test_what_is_not_closed_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not closed"):
        check_lark(text, "grammar")


@pytest.mark.parametrize("part", ["a[", "a{", "(", "a[b", "[a="])
def test_brackets_inside_brackets_are_limited(part: str) -> None:
    with pytest.raises(RequestError, match="nested too deep"):
        check_lark("start: " + part * 101, "grammar")
    assert check_lark("start: " + part * 100, "grammar")


@pytest.mark.parametrize("part", ["a[b] ", "a", "<a", "%llguidance {} ", "]a=", "stop ", "stop_"])
def test_a_long_grammar_is_read_once(part: str) -> None:
    """No part makes a copy of the rest, and a pass that looked at the rest from each part would not end here."""
    text = CountedText("start: " + part * 200_000)
    assert check_lark(text, "grammar") == text
    assert text.copied < 4 * len(text)


def schemas(*each: dict[str, Any]) -> str:
    return "start: " + " | ".join(f"%json {json.dumps(schema)}" for schema in each)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (schemas(*[{"enum": list(range(8_000))}] * 3), "grammar.%json[3].enum[3967]"),
        (
            schemas(*[{"patternProperties": {f"^{at}-{n}$": {} for n in range(40)}} for at in range(3)]),
            "grammar.%json[3].patternProperties",
        ),
        (schemas({"multipleOf": 9_000}, {"multipleOf": 9_001}), "grammar.%json[2].multipleOf"),
    ],
    ids=["parts", "patterns", "multiples"],
)
def test_the_limits_hold_for_all_schemas_of_a_grammar_together(text: str, field: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_lark(text, "grammar")
    assert refused.value.field == field


def test_equal_multiples_in_a_grammar_count_once(grammars: Grammars) -> None:
    grammars.compile(grammar=schemas(*[{"type": "integer", "multipleOf": 9_000}] * 3))

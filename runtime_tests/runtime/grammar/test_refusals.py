"""What cannot be enforced is refused by its path, and never dropped; what is large is refused in bounded time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from runtime_tests.vocabularies import byte_level
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.grammar import Grammars


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_level(), [0, 1], 512)


# Each schema, and the path of the part at fault.
REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "string"}}, "json_schema.not"),
    ({"properties": {"a": {"not": {}}}}, "json_schema.properties.a.not"),
    ({"if": {}, "then": {}}, "json_schema.if"),
    ({"items": {"else": {}}}, "json_schema.items.else"),
    ({"type": "array", "uniqueItems": True}, "json_schema.uniqueItems"),
    ({"contains": {"type": "null"}}, "json_schema.contains"),
    ({"minContains": 1}, "json_schema.minContains"),
    ({"propertyNames": {"pattern": "^a"}}, "json_schema.propertyNames"),
    ({"dependentSchemas": {}}, "json_schema.dependentSchemas"),
    ({"dependentRequired": {"a": ["b"]}}, "json_schema.dependentRequired"),
    ({"dependencies": {"a": ["b"]}}, "json_schema.dependencies"),
    ({"unevaluatedProperties": False}, "json_schema.unevaluatedProperties"),
    ({"unevaluatedItems": False}, "json_schema.unevaluatedItems"),
    ({"$dynamicRef": "#a"}, "json_schema.$dynamicRef"),
    ({"type": "string", "nullable": True}, "json_schema.nullable"),
    ({"x-guidance": {"lenient": True}}, "json_schema.x-guidance"),
    ({"type": "integer", "minimun": 3}, "json_schema.minimun"),
    ({"anyOf": [{}, {"a key": 1}]}, 'json_schema.anyOf[1]["a key"]'),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "unevaluatedItems": False}, "json_schema.unevaluatedItems"),
    ({"$schema": "https://example.com/mine"}, "json_schema.$schema"),
    ({"properties": {"a": {"$id": "b"}}}, "json_schema.properties.a.$id"),
    # oneOf whose options overlap
    (
        {"properties": {"q": {"oneOf": [{"type": "number", "minimum": 1}, {"type": "integer"}]}}},
        "json_schema.properties.q.oneOf",
    ),
    ({"$ref": "#/$defs/q", "$defs": {"q": {"oneOf": [{"type": "string"}, {}]}}}, "json_schema.$defs.q.oneOf"),
    # references
    ({"$ref": "https://example.com/schema"}, "json_schema.$ref"),
    ({"$ref": "other.json#/a"}, "json_schema.$ref"),
    ({"$ref": "#anchor", "$defs": {"a": {"$anchor": "anchor"}}}, "json_schema.$ref"),
    ({"$ref": "#/$defs/missing", "$defs": {}}, "json_schema.$ref"),
    ({"$ref": "#/anyOf/00000000099", "anyOf": [{}]}, "json_schema.$ref"),
    ({"$ref": "#/anyOf/9999999999", "anyOf": [{}]}, "json_schema.$ref"),
    ({"$ref": 5}, "json_schema.$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "json_schema.$defs.a"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}}, "json_schema"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "json_schema"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "json_schema"),
    ({"type": "object", "properties": {"a": {"$ref": "#", "type": "object"}}}, "json_schema.properties.a.$ref"),
    # patterns
    ({"type": "string", "pattern": "(?=a)b"}, "json_schema.pattern"),
    ({"type": "string", "pattern": "(?<!a)b"}, "json_schema.pattern"),
    ({"type": "string", "pattern": r"(a)\1"}, "json_schema.pattern"),
    ({"type": "string", "pattern": r"\bword\b"}, "json_schema.pattern"),
    ({"type": "string", "pattern": "x*^b"}, "json_schema.pattern"),
    ({"type": "string", "pattern": "("}, "json_schema.pattern"),
    ({"type": "string", "pattern": 5}, "json_schema.pattern"),
    ({"patternProperties": {"^a": {}, "b$": {}}}, "json_schema.patternProperties"),
    ({"patternProperties": {"[0-9]": {}, r"\d": {}}}, r'json_schema.patternProperties["\\d"]'),
    # formats
    ({"format": "iri"}, "json_schema.format"),
    ({"format": "unknown"}, "json_schema.format"),
    ({"format": "regex"}, "json_schema.format"),
    # numbers that are not enforced exactly
    ({"const": 2**53 + 1}, "json_schema.const"),
    ({"enum": [1, {"a": [1e300]}]}, "json_schema.enum[1].a[0]"),
    ({"minimum": 1e-20}, "json_schema.minimum"),
    ({"minimum": True}, "json_schema.minimum"),
    ({"minimum": 3, "exclusiveMinimum": True}, "json_schema.exclusiveMinimum"),
    ({"multipleOf": 0}, "json_schema.multipleOf"),
    ({"multipleOf": 1_000_003}, "json_schema.multipleOf"),
    ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "json_schema.allOf[1].multipleOf"),
    ({"minLength": -1}, "json_schema.minLength"),
    ({"maxItems": 2.5}, "json_schema.maxItems"),
    # names that could come twice, and counts that depend on which optional properties come
    ({"type": "object", "minProperties": 2}, "json_schema.minProperties"),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, "json_schema.maxProperties"),
    # values that nothing satisfies
    ({"type": "string", "minLength": 3, "maxLength": 2}, "json_schema"),
    (
        {
            "type": "object",
            "properties": {"z": {"type": "integer", "minimum": 2, "maximum": 1}},
            "required": ["z"],
        },
        "json_schema.properties.z",
    ),
    ({"enum": []}, "json_schema.enum"),
    ({"const": "a\x00b"}, "json_schema.const"),
    # malformed
    ({"type": "text"}, "json_schema.type"),
    ({"type": []}, "json_schema.type"),
    ({"properties": 5}, "json_schema.properties"),
    ({"properties": {"a": 5}}, "json_schema.properties.a"),
    ({"required": "a"}, "json_schema.required"),
    ({"required": [["a"]]}, "json_schema.required"),
    ({"anyOf": []}, "json_schema.anyOf"),
    ({"items": [{}]}, "json_schema.items"),
    ({"prefixItems": {}}, "json_schema.prefixItems"),
    ({"additionalItems": False}, "json_schema.additionalItems"),
    ({"$schema": "http://json-schema.org/draft-07/schema", "additionalItems": 5}, "json_schema.additionalItems"),
    ({"$defs": []}, "json_schema.$defs"),
    ("{", "json_schema"),
    ("[]", "json_schema"),
    ('{"type": "null", "type": "string"}', "json_schema"),
    ('{"const": "\\ud800"}', "json_schema"),
    ({"enum": [float("nan")]}, "json_schema"),
    ({"enum": {1, 2}}, "json_schema"),
    (5, "json_schema"),
]


@pytest.mark.parametrize(("schema", "field"), REFUSED, ids=[str(each[0])[:60] for each in REFUSED])
def test_a_part_that_is_not_enforced_is_refused_by_its_path(grammars: Grammars, schema: Any, field: str) -> None:
    with pytest.raises(RequestError) as refused:
        grammars.compile(json_schema=schema)
    assert refused.value.field == field
    assert refused.value.got is not None and refused.value.wanted


def test_annotations_and_notes_are_no_constraints(grammars: Grammars) -> None:
    notes = {"title": "t", "description": "d", "default": 5, "examples": [1], "deprecated": True, "x-order": 3}
    discriminated = {"discriminator": {"propertyName": "a"}, "readOnly": True, "contentEncoding": "base64"}
    grammars.compile(json_schema={"type": "null", "$id": "https://example.com/a", **notes, **discriminated})
    grammars.compile(json_schema={"type": "array", "uniqueItems": False, "$comment": "false constrains nothing"})


def nested(levels: int, key: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {key: [schema]} if key == "anyOf" else {key: schema}
    return schema


def chain(length: int) -> dict[str, Any]:
    parts: dict[str, Any] = {f"a{at}": {"items": {"$ref": f"#/$defs/a{at + 1}"}} for at in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**parts, f"a{length}": {}}}


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "a deep schema": lambda: {"json_schema": nested(120, "anyOf")},
    "very deep text": lambda: {"json_schema": '{"items":' * 100_000},
    "a long chain of references": lambda: {"json_schema": chain(5_000)},
    "a deep value": lambda: {"json_schema": '{"const":' + "[" * 400 + "]" * 400 + "}"},
    "many values": lambda: {"json_schema": {"enum": [f"value {at}" for at in range(30_000)]}},
    "many objects as values": lambda: {"json_schema": {"enum": [{"a": at} for at in range(4_000)]}},
    "many properties": lambda: {"json_schema": {"properties": {f"p{at}": {} for at in range(5_000)}}},
    "many optional properties": lambda: {"json_schema": {"properties": {f"p{at}": {} for at in range(900)}}},
    "many patterns": lambda: {"json_schema": {"patternProperties": {f"^p{at}x": {} for at in range(500)}}},
    "many options": lambda: {"json_schema": {"oneOf": [{"const": f"c{at}"} for at in range(5_000)]}},
    "a product of options": lambda: {
        "json_schema": {"allOf": [{"anyOf": [{"minLength": at}, {"maxLength": 90 + at}]} for at in range(25)]}
    },
    "a doubling of references": lambda: {
        "json_schema": {
            "$ref": "#/$defs/a0",
            "allOf": [{"$ref": "#/$defs/a0"}],
            "$defs": {
                **{f"a{n}": {"properties": {k: {"$ref": f"#/$defs/a{n + 1}"} for k in "xy"}} for n in range(20)},
                "a20": {},
            },
        }
    },
    "a large text": lambda: {"json_schema": json.dumps({"description": "a" * 2_000_000})},
    "a large multiple": lambda: {"json_schema": {"multipleOf": 4_000_000_007}},
    "nested repetitions": lambda: {"regex": "((a{100}){100}){100}"},
    "deep groups": lambda: {"regex": "(" * 5_000 + "a" + ")" * 5_000},
    "a large pattern with a length": lambda: {
        "json_schema": {"type": "string", "pattern": "(a|b)*a(a|b){200}$", "maxLength": 1_000}
    },
    "deep brackets in a grammar": lambda: {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
    "a long chain of rules": lambda: {
        "grammar": "start: r0\n" + "".join(f'r{at}: r{at + 1} "a"\n' for at in range(10_000)) + 'r10000: "b"'
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_constraint_is_refused(grammars: Grammars, case: str) -> None:
    with pytest.raises(RequestError):
        grammars.compile(**HOSTILE[case]())


def test_a_deep_but_legal_schema_compiles_on_a_thread_with_a_small_stack(grammars: Grammars) -> None:
    before = threading.stack_size(256 * 1024)
    done = []
    try:
        thread = threading.Thread(target=lambda: done.append(grammars.compile(json_schema=chain(60))))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert done and done[0].constraint().allowed().any()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "json_schema"),
        ({"regex": "a", "grammar": "start: /a/"}, "json_schema"),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"regex": "a\ud800"}, "regex"),
        ({"regex": "a(?!b)"}, "regex"),
        ({"grammar": "start: ("}, "grammar"),
        ({"grammar": "start: missing"}, "grammar"),
        ({"grammar": "start: @other"}, "grammar"),
        ({"grammar": "start: <|nothing|>"}, "grammar"),
        ({"grammar": "start: a\na: a"}, "grammar"),
        ({"grammar": ' {"grammars": [{"json_schema": {"not": {}}}]}'}, "grammar"),
        ({"grammar": '%llguidance {"no_forcing": true}\nstart: "a"'}, "grammar"),
        ({"grammar": "start: x\nx[temperature=0.5]: /a/"}, "grammar"),
        ({"grammar": "start: x\nx[capture, max_tokens=5]: /a+/"}, "grammar"),
        ({"grammar": 'start: x "b"\nx[stop="b"]: /a+/'}, "grammar"),
        ({"grammar": 'start: "a" x\nx: %json {"type": "array", "uniqueItems": true}'}, "grammar.%json[1].uniqueItems"),
        ({"grammar": 'start: x\nx: %json {"x-guidance": {"lenient": true}}'}, "grammar.%json[1].x-guidance"),
        ({"grammar": "start: x\nx: %json {"}, "grammar.%json[1]"),
    ],
    ids=str,
)
def test_expressions_and_grammars_are_refused_by_the_same_rules(
    grammars: Grammars, request_: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        grammars.compile(**request_)
    assert refused.value.field == field


def test_what_looks_like_an_option_in_a_text_of_a_grammar_is_none(grammars: Grammars) -> None:
    grammars.compile(grammar='%llguidance {}\nstart: "[temperature=1]" /[stop=x]/ // [stop="a"] and %json\n')


def test_a_request_without_llguidance_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"tp-runtime\[grammar\]") as refused:
        Grammars(byte_level(), [0], 512).compile(regex="a")
    assert refused.value.field == "regex"


def test_a_model_that_nothing_ends_has_no_constraints() -> None:
    with pytest.raises(ModelFormatError, match="no id ends a completion"):
        Grammars(byte_level(), [], 512).compile(regex="a")


def test_a_tokenizer_that_llguidance_cannot_read_is_refused() -> None:
    words = Tokenizer.from_str(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
        '"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}'
    )
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Grammars(words, [0], 2).compile(regex="a")

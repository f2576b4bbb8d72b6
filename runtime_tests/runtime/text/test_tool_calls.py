"""Calls of tools in a finished answer: found in every notation, and left in the text where they are malformed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.runtime.text.notations import ANSWERS, ARGUMENTS, TOOLS, form_of
from tp_runtime.text import ToolCall, checked_messages, tool_calls
from tp_runtime.text.tool_calls import parse_tool_calls, recognise_tool_format
from tp_runtime.text.tool_families import NOTATIONS


def tagged_call(value: str) -> str:
    """Return a call of f in Qwen's notation, whose argument x has a value."""
    return f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"


def tools_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tool f, whose argument x has a schema."""
    parameters = {"type": "object", "properties": {"x": schema}}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


MARKED = [family for family in ANSWERS if family not in ("llama3", "json")]


def test_every_notation_has_an_example() -> None:
    assert list(ANSWERS) == [notation.family for notation in NOTATIONS]


@pytest.mark.parametrize("family", ANSWERS)
def test_a_template_shows_its_family(family: str) -> None:
    template, _answer = ANSWERS[family]
    form = recognise_tool_format(template, {"<tool_call>": 3, "<|tool_call|>": 4, "<other>": 5})
    assert form.family == family
    assert set(form.special_ids) <= {"<tool_call>", "<|tool_call|>"} & set(form.notation.markers)


@pytest.mark.parametrize("family", ANSWERS)
def test_a_call_is_found_and_leaves_the_text(family: str) -> None:
    answer = ANSWERS[family][1]
    for before, after in (("", ""), ("\n", "\n")):
        text, calls = parse_tool_calls(before + answer + after, form_of(family), TOOLS)
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", ARGUMENTS)]
        assert re.fullmatch(r"[a-zA-Z0-9]{9}", calls[0].id)
        assert text == ""


@pytest.mark.parametrize("family", MARKED)
def test_text_around_a_call_stays(family: str) -> None:
    text, calls = parse_tool_calls("I look.\n\n" + ANSWERS[family][1], form_of(family), TOOLS)
    assert text == "I look." and len(calls) == 1


@pytest.mark.parametrize("family", MARKED)
@pytest.mark.parametrize("cut", [0.4, 0.7])
def test_a_call_that_is_cut_stays_in_the_text(family: str, cut: float) -> None:
    answer = "So: " + ANSWERS[family][1]
    cut_off = answer[: int(cut * len(answer))]
    assert parse_tool_calls(cut_off, form_of(family), TOOLS) == (cut_off, [])


def test_calls_of_one_answer_keep_their_order_and_have_ids_of_their_own() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"n": %d}}\n</tool_call>'
    text, calls = parse_tool_calls(f"a\n{call % 1}\n{call % 2} b", form_of("hermes"))
    assert text == "a b" and [one.arguments for one in calls] == [{"n": 1}, {"n": 2}]
    assert len({one.id for one in calls}) == 2


def test_a_malformed_call_stays_and_the_next_one_is_found() -> None:
    bad = "<tool_call>\n{name: f}\n</tool_call>"
    good = '<tool_call>{"name": "f"}</tool_call>'
    text, calls = parse_tool_calls(bad + good, form_of("hermes"))
    assert text == bad and [(call.name, call.arguments) for call in calls] == [("f", {})]


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "get_weather", "parameters": "x"}',
        '{"name": "other", "parameters": {}}',  # a tool that the request does not have
        '{"name": "get_weather"}',
        'It is {"name": "get_weather", "parameters": {}}',
        '{"name": "get_weather", "parameters": {}} and more',
        '{"city": "x"}',
        "[]",
        "<|python_tag|>print(1)",
        "<|python_tag|>import os",
    ],
)
def test_json_without_markers_is_a_call_only_if_the_whole_answer_calls_tools_of_the_request(answer: str) -> None:
    assert parse_tool_calls(answer, form_of("llama3"), TOOLS) == (answer, [])


def test_llama_writes_several_calls_and_built_in_tools() -> None:
    two = '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "x"}}'
    assert [call.name for call in parse_tool_calls(two, form_of("llama3"), TOOLS)[1]] == ["now", "get_weather"]
    (call,) = parse_tool_calls('<|python_tag|>brave_search.call(query="a, b")', form_of("llama3"), TOOLS)[1]
    assert (call.name, call.arguments) == ("brave_search", {"query": "a, b"})


def test_ids_that_a_model_writes_are_kept() -> None:
    for family, answer in (
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc123xyz"}]'),
        ("mistral-args", "[TOOL_CALLS]f[CALL_ID]abc123xyz[ARGS]{}"),
    ):
        assert parse_tool_calls(answer, form_of(family))[1] == [ToolCall("abc123xyz", "f", {})]


def test_the_schema_tells_text_between_tags_from_numbers() -> None:
    answer = "<tool_call><function=f><parameter=a>5</parameter><parameter=b>5</parameter></function></tool_call>"
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"anyOf": [{"type": "integer"}]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    (call,) = parse_tool_calls(answer, form_of("qwen-xml"), tools)[1]
    assert call.arguments == {"a": "5", "b": 5}


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "", "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}",
        "[]",
        "",
    ],
)
def test_a_hostile_call_stays_in_the_text(inner: str) -> None:
    answer = f"<tool_call>{inner}</tool_call>"
    assert parse_tool_calls(answer, form_of("hermes")) == (answer, [])


@pytest.mark.parametrize("family", ["functiongemma", "gemma4", "lfm2"])
def test_arguments_that_are_nested_too_deep_stay_in_the_text(family: str) -> None:
    opening = form_of(family).notation.openings[0]
    for deep in (
        "f{a:" + "[" * 100_000,
        "[f(a=" + "[" * 100_000 + "]" * 100_000 + ")]",
        "[f(a=" + "-" * 100_000 + "1)]",
    ):
        assert parse_tool_calls(opening + deep, form_of(family)) == (opening + deep, [])


@pytest.mark.parametrize("schema", [3, {"enum": 3}, {"type": [{}]}, {"anyOf": 3}, {"const": "x"}, {"oneOf": [3]}])
def test_a_strange_schema_of_a_tool_does_not_matter(schema: object) -> None:
    answer = "<tool_call><function=f><parameter=a>x</parameter></function></tool_call>"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}]
    (call,) = parse_tool_calls(answer, form_of("qwen-xml"), tools)[1]
    assert call.arguments == {"a": "x"}


@pytest.mark.parametrize(
    "value",
    ["{[1]}", "{{1: 2}}", "{1}", "1+2", "1+2j", "9" * 400 + "+1j", "-[1]", "- -1", "b'x'", "...", "{1: 2}", "{**{}}"],
)
def test_a_value_of_python_that_json_cannot_state_never_makes_the_parser_raise(value: str) -> None:
    listed = f"<|tool_call_start|>[f(x={value})]<|tool_call_end|>"
    assert parse_tool_calls(listed, form_of("lfm2")) == (listed, [])
    (call,) = parse_tool_calls(tagged_call(value), form_of("qwen-xml"), tools_of({"type": "object"}))[1]
    assert call.arguments == {"x": value}


@pytest.mark.parametrize(
    "text", ["a" + ".b" * 100_000 + "(x=1)", "f(x=" + "1+" * 100_000 + "1)", "f" + "(a=1)" * 100_000]
)
@pytest.mark.parametrize("family", ["lfm2", "llama3"])
def test_a_long_chain_of_python_stays_in_the_text(family: str, text: str) -> None:
    answer = form_of(family).notation.openings[0] + text
    assert parse_tool_calls(answer, form_of(family), TOOLS) == (answer, [])


@pytest.mark.parametrize("value", ["1e999", "[-1e999]", r"'\ud800'", r"{'\ud800': 1}", "[0x" + "f" * 5000 + "]"])
def test_what_no_message_could_hold_is_the_text_that_states_it(value: str) -> None:
    for kind in ("number", "object", "array", "integer"):
        (call,) = parse_tool_calls(tagged_call(value), form_of("qwen-xml"), tools_of({"type": kind}))[1]
        assert call.arguments == {"x": value}
    listed = f"<|tool_call_start|>[f(x={value})]<|tool_call_end|>"
    assert parse_tool_calls(listed, form_of("lfm2")) == (listed, [])


@pytest.mark.parametrize("family", ["hermes", "functiongemma", "lfm2", "qwen-xml"])
def test_arguments_are_nested_no_deeper_than_a_chats_messages_can_be(family: str) -> None:
    for levels in range(1, 80):
        value = "[" * levels + "]" * levels
        answer = {
            "hermes": f'<tool_call>{{"name": "f", "arguments": {{"x": {value}}}}}</tool_call>',
            "functiongemma": f"<start_function_call>call:f{{x:{value}}}<end_function_call>",
            "lfm2": f"<|tool_call_start|>[f(x={value})]<|tool_call_end|>",
            "qwen-xml": tagged_call(value),
        }[family]
        text, calls = parse_tool_calls(answer, form_of(family))
        assert bool(calls) is (levels <= 48) and text == ("" if calls else answer)
        checked_messages(
            [
                {"role": "assistant", "tool_calls": [call.message_entry() for call in calls], "content": "x"},
                {"role": "user", "content": "x"},
            ]
        )


@pytest.mark.parametrize(
    ("family", "answer"),
    [
        ("functiongemma", "<start_function_call>call:f{when:2024-01-05}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{n:5km}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{l:[1,2x]}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{<escape>a<escape>b:1}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{a,b:1}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{a}<end_function_call>:1}<end_function_call>"),
        ("gemma4", "<|tool_call>call:f{n:5km}<tool_call|>"),
        ("gemma4", "<|tool_call>call:f{n:truex}<tool_call|>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{} and more"}</tool_call>'),
        ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}{\"b\": 2}"}</tool_call>'),
        ("lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {}}] and more<|tool_call_end|>'),
        ("lfm2", '<|tool_call_start|>{"name": "f"}{"name": "g"}<|tool_call_end|>'),
    ],
)
def test_a_value_that_would_be_read_in_part_stays_in_the_text(family: str, answer: str) -> None:
    assert parse_tool_calls(answer, form_of(family)) == (answer, [])


def test_spaces_around_what_is_read_are_no_part_of_it() -> None:
    answer = "<start_function_call>call:f{ <escape>a<escape> : 1 , b : [ true ] }<end_function_call>"
    (call,) = parse_tool_calls(answer, form_of("functiongemma"))[1]
    assert call.arguments == {"a": 1, "b": [True]}
    answer = r'<tool_call>{"name": "f", "arguments": " {\"a\": 1}\n"}</tool_call>'
    assert parse_tool_calls(answer, form_of("hermes"))[1][0].arguments == {"a": 1}


# -- work ----------------------------------------------------------------------------------------------------


def broken(opening: str) -> list[str]:
    """Return beginnings of calls that no reader of an opening can end."""
    return [
        opening,
        opening + "x<arg_key></arg_key><arg_value>",
        opening + "x<arg_key>",
        opening + "x<arg_key></arg_key>",
        opening + "<function=f><parameter=a>",
        opening + "<function=f>" + "\n" * 20,
        opening + 'f"><param name="a">',
        opening + "f{a:",
        opening + "f{a:<escape>",
        opening + " " * 20,
        opening + '[{"name": "f", ',
        opening + "[f(a='",
        opening + "f[ARGS]{",
    ]


@pytest.mark.parametrize("family", [family for family in ANSWERS if family != "json"])
def test_an_answer_that_repeats_the_beginning_of_a_call_is_read_in_the_end(family: str) -> None:
    notation = form_of(family).notation
    for piece in broken(notation.openings[0]):
        answer = piece * 2000  # GLM's notation took minutes, with the cube of this number
        text, calls = parse_tool_calls(answer, form_of(family), TOOLS)
        assert (text, calls) == (answer, [])


def test_many_beginnings_of_arguments_after_one_beginning_of_a_call_are_read_in_the_end() -> None:
    for piece in ("<arg_key></arg_key><arg_value>", "<arg_key></arg_key>", "<arg_key>", "<"):
        answer = "<tool_call>x" + "<arg_key>" + piece * 100_000  # took hours, with the square or cube of this number
        assert parse_tool_calls(answer, form_of("glm")) == (answer, [])


@pytest.mark.parametrize("family", MARKED)
def test_few_malformed_calls_are_read_and_the_rest_is_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, answer = form_of(family).notation.openings[0], ANSWERS[family][1]
    form, reads = form_of(family), []

    def read(text: str, at: int, parameters: Any) -> Any:
        reads.append(at)
        if text.startswith(f"{opening}\0", at):
            raise ValueError("malformed")
        return notation.read(text, at, parameters)

    notation = form.notation
    monkeypatch.setitem(tool_calls.BY_FAMILY, family, replace(notation, read=read))
    for failures, found in ((63, 1), (64, 0), (5000, 0)):
        reads.clear()
        bad = f"{opening}\0" * failures
        text, calls = parse_tool_calls(bad + answer, form, TOOLS)
        assert len(calls) == found and text == (bad if found else bad + answer)
        assert len(reads) == min(failures + 1, 64)


PIECES = sorted({marker for notation in NOTATIONS for marker in (*notation.openings, *notation.markers)})
PIECES += [
    "f",
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "(",
    ")",
    "=",
    "\n",
    "```json",
    "```",
    "{[1]}",
    "1e999",
    "f(a=",
    "<function=f>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    '<param name="a">',
    "</param>",
    '{"name": "f", "arguments": {',
    "\x00",
]


@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.sampled_from(PIECES), max_size=14))
@settings(max_examples=400, deadline=None)
def test_no_answer_makes_the_parser_raise(family: str, pieces: list[str]) -> None:
    answer = "".join(pieces)
    text, calls = parse_tool_calls(answer, form_of(family), TOOLS)
    assert calls or text == answer


def test_a_call_is_an_entry_of_the_next_turns_message() -> None:
    entry = ToolCall("abc123xyz", "f", {"a": 1}).message_entry()
    assert entry == {"type": "function", "id": "abc123xyz", "function": {"name": "f", "arguments": {"a": 1}}}

"""The grammar of tool_choice in every notation: what it lets through is a call that fits the tool's schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime_tests.runtime.text.notations import ANSWERS, ARGUMENTS, PARAMETERS, TOOLS, form_of
from tp_runtime.errors import RequestError
from tp_runtime.grammar import Grammars
from tp_runtime.text.reasoning import PromptTail, ReasoningTags
from tp_runtime.text.tool_calls import ToolFormat, parse_tool_calls
from tp_runtime.text.tool_families import NOTATIONS, Layout
from tp_runtime.text.tool_grammar import tool_constraint

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="the test extra is not installed")

GET_WEATHER = {"type": "function", "function": {"name": "get_weather"}}
JSON_FAMILIES = [notation.family for notation in NOTATIONS if isinstance(notation.layout, Layout)]
LFM = ("lfm2", "lfm2.5-instruct")  # a grammar asks these for JSON, and the examples are Python's notation


def tokenizer_with(special: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<eos>", *special], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ['{"name": "get_weather", "arguments": {"city": "a"}} of the true false'] * 9, trainer
    )
    return tokenizer


class Matcher:
    """One grammar over one tokenizer, as the room `grammar` compiles it."""

    def __init__(self, grammar: str | None, tokenizer: Tokenizer) -> None:
        assert grammar is not None
        self.tokenizer = tokenizer
        compiled = Grammars(tokenizer, frozenset([0]), tokenizer.get_vocab_size()).compile(grammar=grammar)
        self.constraint = compiled.constraint()

    def accepts(self, text: str) -> bool:
        ids = [*self.tokenizer.encode(text).ids, 0]
        for i, token in enumerate(ids):
            self.constraint.follow(ids[:i])
            if not self.constraint.allows(token):
                return False
        return True

    def answer(self, seed: int, longest: int = 300) -> str | None:
        """Return a random answer that ends by itself; None if it does not."""
        generator, ids = np.random.default_rng(seed), []
        closing = [self.tokenizer.token_to_id(text) for text in ('"', "}", "]", "<eos>")]
        for _ in range(longest):
            self.constraint.follow(ids)
            allowed = np.flatnonzero(np.unpackbits(self.constraint.allowed().view(np.uint8), bitorder="little"))
            close = [token for token in closing if token in allowed]
            token = int(generator.choice(close if close and generator.random() < 0.4 else allowed))
            if token == 0:
                return self.tokenizer.decode(ids, skip_special_tokens=False)
            ids.append(token)
        return None


def form_and_tokenizer(family: str, special: bool) -> tuple[ToolFormat, Tokenizer]:
    markers = form_of(family).notation.markers if special else ()
    tokenizer = tokenizer_with(markers)
    return form_of(family, {text: tokenizer.token_to_id(text) for text in markers}), tokenizer


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("family", [family for family in ANSWERS if family not in LFM])
def test_the_grammar_accepts_what_the_family_writes(family: str, special: bool) -> None:
    form, tokenizer = form_and_tokenizer(family, special)
    answer = ANSWERS[family][1].replace("'wind': True", '"wind": true')
    for choice in ("required", GET_WEATHER):
        assert Matcher(tool_constraint(TOOLS, choice, form), tokenizer).accepts(answer)
        assert not Matcher(tool_constraint(TOOLS, choice, form), tokenizer).accepts("It is warm.")
        wrong = answer.replace("3", "15", 1)  # above the maximum of the schema
        assert not Matcher(tool_constraint(TOOLS, choice, form), tokenizer).accepts(wrong)


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("family", JSON_FAMILIES)
def test_random_answers_under_the_grammar_are_calls_that_fit(family: str, special: bool) -> None:
    form, tokenizer = form_and_tokenizer(family, special)
    ended = 0
    for seed in range(6):
        answer = Matcher(tool_constraint(TOOLS, "required", form), tokenizer).answer(seed)
        if answer is None:
            continue
        ended += 1
        text, calls = parse_tool_calls(answer, form, TOOLS)
        assert calls and not text, answer
        for call in calls:
            schema = PARAMETERS if call.name == "get_weather" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(call.arguments, schema)
    assert ended >= 3


def test_required_lets_several_calls_through_and_a_named_tool_one() -> None:
    form, tokenizer = form_and_tokenizer("hermes", False)
    two = "\n".join([ANSWERS["hermes"][1], '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'])
    assert Matcher(tool_constraint(TOOLS, "required", form), tokenizer).accepts(two)
    assert not Matcher(tool_constraint(TOOLS, GET_WEATHER, form), tokenizer).accepts(two)
    other = {"type": "function", "function": {"name": "now"}}
    assert not Matcher(tool_constraint(TOOLS, other, form), tokenizer).accepts(ANSWERS["hermes"][1])


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_other_choices_constrain_nothing(tools: Any, choice: str) -> None:
    assert tool_constraint(tools, choice, form_of("hermes")) is None


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize(
    ("tail", "before", "accepted"),
    [
        ("none", "", True),
        ("none", "<think>\nhm < 3\n</think>\n\n", True),
        ("none", "hm</think>", False),
        ("open", "hm\n</think>\n\n", True),
        ("open", "", False),
        ("closed", "", True),
        ("closed", "<think>hm</think>", False),
    ],
)
def test_reasoning_comes_before_the_calls_unless_the_prompt_closes_it(
    special: bool, tail: PromptTail, before: str, accepted: bool
) -> None:
    tokenizer = tokenizer_with(("<think>", "</think>") if special else ())
    ids = {text: tokenizer.token_to_id(text) for text in ("<think>", "</think>") if special}
    tags = ReasoningTags("<think>", "</think>", ids)
    grammar = tool_constraint(TOOLS, "required", form_of("hermes"), tags, tail)
    assert Matcher(grammar, tokenizer).accepts(before + ANSWERS["hermes"][1]) is accepted


def tools_with(schema: Any, name: str = "f") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": schema}}]


@pytest.mark.parametrize("family", ["functiongemma", "qwen-xml", "glm"])
def test_optional_arguments_unions_and_lists_have_their_places(family: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "b": {"type": "array", "items": {"type": "string"}},
            "c": {"enum": ["x", 1, None], "title": "C"},
            "d": {"type": ["number", "boolean"]},
        },
        "required": ["c"],
    }
    form, tokenizer = form_and_tokenizer(family, True)
    ended = 0
    for seed in range(8):
        answer = Matcher(tool_constraint(tools_with(schema), "required", form), tokenizer).answer(seed, 120)
        if answer is not None:
            ended += 1
            for call in parse_tool_calls(answer, form, tools_with(schema))[1]:
                jsonschema.validate(call.arguments, schema)
    assert ended
    writes = {
        "functiongemma": "<start_function_call>call:f{%s}<end_function_call>",
        "qwen-xml": "<tool_call>\n<function=f>\n%s</function>\n</tool_call>",
        "glm": "<tool_call>f\n%s</tool_call>",
    }[family]
    one = {
        "functiongemma": ("c:<escape>x<escape>", "a:null,b:[<escape>u<escape>,<escape>v<escape>],c:1,d:true"),
        "qwen-xml": (
            "<parameter=c>\nx\n</parameter>\n",
            '<parameter=a>\nnull\n</parameter>\n<parameter=b>\n["u", "v"]\n</parameter>\n'
            "<parameter=c>\n1\n</parameter>\n<parameter=d>\ntrue\n</parameter>\n",
        ),
        "glm": (
            "<arg_key>c</arg_key>\n<arg_value>x</arg_value>\n",
            "<arg_key>a</arg_key>\n<arg_value>null</arg_value>\n"
            '<arg_key>b</arg_key>\n<arg_value>["u", "v"]</arg_value>\n'
            "<arg_key>c</arg_key>\n<arg_value>1</arg_value>\n<arg_key>d</arg_key>\n<arg_value>true</arg_value>\n",
        ),
    }[family]
    for written, want in zip(one, ({"c": "x"}, {"a": None, "b": ["u", "v"], "c": 1, "d": True}), strict=True):
        answer = writes % written
        assert Matcher(tool_constraint(tools_with(schema), "required", form), tokenizer).accepts(answer)
        assert [call.arguments for call in parse_tool_calls(answer, form, tools_with(schema))[1]] == [want]


def test_json_arguments_keep_references_and_everything_else_of_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/node"}, "date": {"type": "string", "format": "date"}},
        "required": ["tree", "date"],
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    }
    form, tokenizer = form_and_tokenizer("hermes", False)
    grammar = tool_constraint(tools_with(schema), "required", form)
    call = '<tool_call>\n{"name": "f", "arguments": {"tree": {"next": {}}, "date": "%s"}}\n</tool_call>'
    assert Matcher(grammar, tokenizer).accepts(call % "2026-11-26")
    assert not Matcher(grammar, tokenizer).accepts(call % "soon")


@pytest.mark.parametrize("family", ["functiongemma", "qwen-xml"])
@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}}, "properties.a.$ref"),
        ({"properties": {"a": {"type": "date"}}}, "properties.a.type"),
        ({"properties": {"a": {}}}, "properties.a.type"),
        ({"properties": {"a": 3}}, "properties.a"),
        ({"properties": {"a": {"anyOf": []}}}, "properties.a.anyOf"),
        ({"properties": {"a": {"enum": []}}}, "properties.a"),
        ({"properties": [1]}, "properties"),
        ({"required": ["b"]}, "required"),
        ({"minProperties": 1}, "minProperties"),
        ({"type": "array"}, "type"),
    ],
)
def test_what_a_notation_cannot_be_held_to_is_refused_by_its_path(family: str, schema: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        tool_constraint(tools_with(schema), "required", form_of(family))
    assert error.value.field == f"tools[0].function.parameters.{field}"


@pytest.mark.parametrize("family", ["mistral-args", "qwen-xml", "gemma4"])
def test_a_name_that_a_notation_cannot_hold_is_refused(family: str) -> None:
    with pytest.raises(RequestError) as error:
        tool_constraint(tools_with({}, "a b>"), "required", form_of(family))
    assert error.value.field == "tools[0].function.name"
    assert tool_constraint(tools_with({}, 'a "b'), "required", form_of("hermes"))


def test_the_example_call_fits_its_schema() -> None:
    jsonschema.validate(ARGUMENTS, PARAMETERS)

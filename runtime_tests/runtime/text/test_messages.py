"""Messages, tools, documents and template arguments: what is accepted, as transformers accepts it, and what is not."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from runtime_tests.codecs import codec_of
from runtime_tests.runtime.text.test_codec import byte_level_folder
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.patch import ENTRIES_STAND
from tp_runtime.text import TextCodec
from tp_runtime.text.messages import checked_messages
from tp_runtime.text.tools import checked_tool_choice, checked_tools, refuse_tools_and_documents

# A template that prints everything it gets.
PRINTS = """{% for message in messages %}{{ message | tojson }}
{% endfor %}{{ tools | tojson }} {{ documents | tojson }} {{ style | default('none') }}"""
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
USER = {"role": "user", "content": "Why?"}
CALL = {"type": "function", "id": "a", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def prints(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return codec_of(byte_level_folder(tmp_path_factory.mktemp("prints") / "model", PRINTS))


def printed(codec: TextCodec, messages: Any, **options: Any) -> str:
    return codec.decode(codec.render(messages, **options), skip_special_tokens=False)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def loop() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def doubled() -> Any:
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


# ---- messages


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "", "tool_call_id": "a"}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}],
        [
            {
                "role": "user",
                "content": "x",
                "name": "Ann",
                "reasoning_content": None,
                "score": [1, 2.5, True, {"a": {}}],
            }
        ],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cached": True}]}],
    ],
)
def test_messages_reach_the_template_as_they_are(prints: TextCodec, messages: Any) -> None:
    want = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)
    assert printed(prints, messages) == want + "null null none"


def test_a_template_gets_copies_of_plain_types(prints: TextCodec) -> None:
    class Role(str, enum.Enum):  # noqa: UP042 - unlike a StrEnum, it prints as its name
        USER = "user"

    message = MappingProxyType({"role": Role.USER, "content": "x", "extra": (1, MappingProxyType({"a": 2}))})
    copies = checked_messages((message,))
    assert copies == [{"role": "user", "content": "x", "extra": [1, {"a": 2}]}] and type(copies[0]["role"]) is str
    assert printed(prints, [message]).startswith('{"role": "user", "content": "x", "extra": [1, {"a": 2}]}')


BAD_MESSAGES: list[tuple[Any, str]] = [
    ([USER, 3], "messages[1].role"),
    ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "assistant", "content": None}], "messages[0].content"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text", "text": "  "}]}], "messages"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
    ([USER, {"role": "assistant", "tool_calls": {"a": 1}}], "messages[1].tool_calls"),
    ([USER, {"role": "assistant", "tool_calls": ["f"]}], "messages[1].tool_calls[0]"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[1].tool_calls[0].function.name"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": ""}]}], "messages[1].tool_calls[0].name"),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
        "messages[1].tool_calls[0].function.arguments",
    ),
    ([{"role": "user", "content": "x", "name": "a\ud800"}], "messages[0].name"),
    ([{"role": "user", "content": "x\ud800"}], "messages[0].content"),
    ([{"role": "user", "content": "x", "a\ud800": 1}], "messages[0]"),
    ([{"role": "user", "content": "x", 3: 1}], "messages[0]"),
    ([{"role": "user", "content": "x", "extra": {"a": [b"x"]}}], "messages[0].extra.a[0]"),
    ([{"role": "user", "content": "x", "extra": {"a": object()}}], "messages[0].extra.a"),
    ([{"role": "user", "content": "x", "extra": float("nan")}], "messages[0].extra"),
    ([{"role": "user", "content": "x", "extra": float("inf")}], "messages[0].extra"),
]


@pytest.mark.parametrize(("messages", "field"), BAD_MESSAGES)
def test_a_malformed_message_is_refused_by_its_path(prints: TextCodec, messages: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        prints.render(messages)
    assert error.value.field == field and error.value.wanted


@pytest.mark.parametrize("make", [lambda: deep(70), loop, doubled])
@pytest.mark.parametrize("field", ["messages", "tools", "documents", "template_args"])
def test_a_value_without_end_is_refused(prints: TextCodec, make: Callable[[], Any], field: str) -> None:
    value = make()
    options: dict[str, Any] = {
        "messages": {"messages": [{**USER, "extra": value}]},
        "tools": {"tools": [{"function": {"name": "f", "parameters": {"enum": value}}}]},
        "documents": {"documents": [{"text": value}]},
        "template_args": {"template_args": {"style": value}},
    }[field]
    with pytest.raises(RequestError, match=r"too deep|too large") as error:
        prints.render(**{"messages": [USER], **options})
    assert error.value.field.startswith(field)


def test_an_image_says_what_to_do(prints: TextCodec) -> None:
    with pytest.raises(RequestError, match="not text but image, and the model takes text alone") as error:
        prints.render([{"role": "user", "content": [{"type": "image", "url": "x"}]}])
    assert error.value.fix


def test_parts_go_to_a_template_that_reads_them_and_no_template_prints_them_as_python_does(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert printed(codec_of(byte_level_folder(tmp_path / "reads", PARTS)), parts) == "ab"
    for name, template in (("prints", "{{ messages[0].content }}"), ("fails", "{{ 'x' + messages[0].content }}")):
        with pytest.raises(RequestError) as error:
            codec_of(byte_level_folder(tmp_path / name, template)).render(parts)
        assert error.value.field.startswith("messages") and error.value.fix


# ---- tools, documents, template arguments


def test_tools_documents_and_arguments_reach_the_template(prints: TextCodec) -> None:
    documents = [{"title": "T", "text": "é"}]
    text = printed(prints, [USER], tools=[TOOL], documents=documents, template_args={"style": "terse"})
    assert text.splitlines()[-1] == f"{json.dumps([TOOL])} {json.dumps(documents, ensure_ascii=False)} terse"
    assert printed(prints, [USER], tools=[], documents=[]).endswith("[] [] none")


def test_an_argument_that_a_template_needs_is_missing_in_a_request_and_not_in_the_model(tmp_path: Path) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model", "{{ tools[0].function.description.upper() }}x"))
    with pytest.raises(RequestError):
        codec.render([USER], tools=[TOOL])
    with pytest.raises(ModelFormatError):
        codec.render([USER])


BAD_TOOLS: list[tuple[Any, str]] = [
    ("f", "tools"),
    ({"a": 1}, "tools"),
    ([3], "tools[0]"),
    ([{"name": "f"}], "tools[0].function"),
    ([{"type": "retrieval", "function": {"name": "f"}}], "tools[0].type"),
    ([{"type": "function", "function": {}}], "tools[0].function.name"),
    ([{"type": "function", "function": {"name": " "}}], "tools[0].function.name"),
    ([{"type": "function", "function": {"name": "f", "description": 3}}], "tools[0].function.description"),
    ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], "tools[0].function.parameters"),
    ([TOOL, TOOL], "tools[1].function.name"),
    ([{"type": "function", "function": {"name": "f", "parameters": {"a": {1}}}}], "tools[0].function.parameters.a"),
    ([{"type": "function", "function": {"name": "f\ud800"}}], "tools[0].function.name"),
]


@pytest.mark.parametrize(("tools", "field"), BAD_TOOLS)
def test_a_malformed_tool_is_refused_by_its_path(prints: TextCodec, tools: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        prints.render([USER], tools=tools)
    assert error.value.field == field


def test_a_function_of_python_is_refused_with_the_way_to_its_schema() -> None:
    with pytest.raises(RequestError, match="get_json_schema") as error:
        checked_tools([len])
    assert error.value.field == "tools[0]"


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (3, "template_args"),
        ({"a b": 1}, "template_args"),
        ({"self": 1}, "template_args.self"),
        ({"messages": []}, "template_args.messages"),
        ({"tools": []}, "template_args.tools"),
        ({"add_generation_prompt": True}, "template_args.add_generation_prompt"),
        ({"bos_token": "x"}, "template_args.bos_token"),
        ({"image_token": "x"}, "template_args.image_token"),  # a special token that this model alone has
        ({"chat_template": "x"}, "template_args.chat_template"),
        ({"raise_exception": 1}, "template_args.raise_exception"),
        ({"style": {1: 2}}, "template_args.style"),
    ],
)
def test_a_template_argument_that_is_reserved_or_malformed_is_refused(prints: TextCodec, args: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        prints.render([USER], template_args=args)
    assert error.value.field == field


@pytest.mark.parametrize(("documents", "field"), [("x", "documents"), (["x"], "documents[0]"), ({"a": 1}, "documents")])
def test_malformed_documents_are_refused(prints: TextCodec, documents: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        prints.render([USER], documents=documents)
    assert error.value.field == field


@pytest.mark.parametrize("options", [{"tools": [TOOL]}, {"documents": [{}]}, {"template_args": {"style": 1}}])
def test_text_without_a_template_takes_nothing_for_one(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = byte_level_folder(tmp_path / "model", PRINTS)
    for codec, raw in ((codec_of(folder), True), (codec_of(folder, "completion"), False)):
        with pytest.raises(RequestError, match="no chat template") as error:
            codec.render("x", raw=raw, **options)
        assert error.value.field == next(iter(options)) and error.value.fix


@pytest.mark.parametrize("field", ["tools", "documents"])
def test_entries_refuse_tools_and_documents_in_the_patchs_own_words(field: str) -> None:
    refuse_tools_and_documents(None, None)
    for value in ([], [TOOL]):
        with pytest.raises(RequestError) as error:
            refuse_tools_and_documents(**{"tools": None, "documents": None, field: value})
        assert error.value.field == field and ENTRIES_STAND in error.value.problem


# ---- the choice of a tool


@pytest.mark.parametrize("choice", ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}])
def test_a_choice_of_a_tool_is_taken(choice: Any) -> None:
    assert checked_tool_choice(choice, [TOOL]) == choice


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("f", [TOOL]),
        (None, [TOOL]),
        (["auto"], [TOOL]),
        ("required", None),
        ("required", []),
        ({"type": "function"}, [TOOL]),
        ({"function": {"name": "f"}}, [TOOL]),
        ({"type": "function", "function": {"name": "g"}}, [TOOL]),
        ({"type": "function", "function": {"name": "f"}}, None),
    ],
)
def test_a_choice_that_the_request_cannot_meet_is_refused(choice: Any, tools: Any) -> None:
    with pytest.raises(RequestError) as error:
        checked_tool_choice(choice, tools)
    assert error.value.field == "tool_choice"


# ---- markers in the text of an answer


def test_markers_that_are_special_tokens_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{# <|im_start|> is of no notation #}<think></think><|tool_call|>"
    folder = byte_level_folder(tmp_path / "model", template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {}
    for i, text in enumerate(("<think>", "</think>", "<|tool_call|>")):
        ids[text] = 500 + i
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": i != 1}
        tokenizer["added_tokens"].append({"id": 500 + i, "content": text, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    codec = codec_of(folder)
    assert codec.tool_format is not None and codec.tool_format.family == "granite"
    assert codec.reasoning_tags is not None and codec.reasoning_tags.opening == "<think>"
    answer = codec.render("<|im_start|><think>a</think>b<|tool_call|><|im_end|>", raw=True)
    assert codec.decode(answer) == "a</think>b"
    assert codec.decode(answer, keep_markers=True) == "<think>a</think>b<|tool_call|>"
    assert codec.prompt_tail(codec.render("x<think>\n", raw=True)) == "open"
    assert codec.prompt_tail(codec.render("x<think>\n\n</think>\n\n", raw=True)) == "closed"
    assert codec.prompt_tail(codec.render("<think>x", raw=True)) == "none"

"""What a request asks of its answer: when reasoning and calls of tools are looked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from runtime_tests.codecs import codec_of
from runtime_tests.runtime.text.notations import ANSWERS, TOOLS
from runtime_tests.runtime.text.test_codec import byte_level_folder
from tp_runtime.errors import RequestError
from tp_runtime.loaded_patches import LoadedPatches
from tp_runtime.text import AnswerChunk, Request
from tp_runtime.text.encoder import EncodedRequest, RequestEncoder

# A model that reasons unless it is told not to, and writes calls as Hermes does.
THINKS = """{% if tools %}<tool_call>{% endif %}{{ messages[0].content }}
{% if thinking is not defined %}<think>
{% else %}<think></think>{% endif %}"""
CALL = ANSWERS["hermes"][1]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> RequestEncoder:
    codec = codec_of(byte_level_folder(tmp_path_factory.mktemp("thinks") / "model", THINKS))
    base = SimpleNamespace(patch=None, bound=SimpleNamespace(prefix=None))
    return RequestEncoder(codec, cast(LoadedPatches, SimpleNamespace(resolve=lambda *_: base)), 400)


def read(encoded: EncodedRequest, answer: str) -> AnswerChunk:
    if encoded.reader is None:
        return AnswerChunk(answer)
    reader = encoded.reader.copy()
    begun, rest = reader.push(answer), reader.end()
    return AnswerChunk(begun.text + rest.text, begun.reasoning + rest.reasoning, rest.tool_calls)


@pytest.mark.parametrize(
    ("options", "text", "reasoning", "calls"),
    [
        ({}, CALL, "hm", 0),
        ({"tools": TOOLS}, "", "hm", 1),
        ({"tools": TOOLS, "tool_choice": "none"}, CALL, "hm", 0),
        ({"tools": TOOLS, "template_args": {"thinking": False}}, "hm</think>", "", 1),
        ({"raw": True}, f"hm</think>{CALL}", "", 0),
        ({"regex": "a*"}, f"hm</think>{CALL}", "", 0),  # what is held to a form is all answer
    ],
)
def test_reasoning_and_calls_are_looked_for_where_the_request_can_have_them(
    encoder: RequestEncoder, options: dict[str, Any], text: str, reasoning: str, calls: int
) -> None:
    if "regex" in options:
        pytest.importorskip("llguidance")
    got = read(encoder.encode(Request("Why?", **options)), f"hm</think>{CALL}")
    assert (got.text, got.reasoning, len(got.tool_calls)) == (text, reasoning, calls)


# -- entries in front of a system message --------------------------------------------------------------------

SYSTEM_LAST = (
    "{% if tools %}{{ tools[0].function.name }}: {% endif %}{{ messages[0].content }}{{ messages[-1].content }}"
)
SYSTEM_FIRST = (
    "{{ messages[0].content }}{% if tools %}{{ tools[0].function.name }}: {% endif %}{{ messages[-1].content }}"
)


@pytest.mark.parametrize(("template", "accepted"), [(SYSTEM_FIRST, True), (SYSTEM_LAST, False)])
def test_tools_may_not_come_between_entries_and_the_system_message(
    tmp_path: Path, template: str, accepted: bool
) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model", template))
    bound = SimpleNamespace(prefix=SimpleNamespace(before_system=True))
    under = SimpleNamespace(patch=None, bound=bound)
    encoder = RequestEncoder(codec, cast(LoadedPatches, SimpleNamespace(resolve=lambda *_: under)), 400)
    encoder.encode(Request("Why?", system="Be brief."))
    request = Request("Why?", system="Be brief.", tools=TOOLS, tool_choice="none")
    if accepted:
        encoder.encode(request)
        return
    with pytest.raises(RequestError, match="the chat template writes tools in front of the system message"):
        encoder.encode(request)

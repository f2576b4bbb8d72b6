"""The official `openai` client, unchanged: chats, streams, tools, parsed answers, completions, patches as models."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.serve.answers import ChatCompletion, ModelList, TextCompletion

from .conftest import CHAT, Running

MESSAGES: Any = [{"role": "user", "content": "How do I learn to swim?"}]
SAMPLED: Any = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "remember",
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["Ada", "Bob"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(served: Running) -> openai.OpenAI:
    return served.openai()


def test_a_chat_answers_what_the_model_answers(client: openai.OpenAI, model: PatchedModel) -> None:
    answer = client.chat.completions.create(model="tiny-llama", messages=MESSAGES, max_tokens=9)
    want = model.complete(MESSAGES, patch=None, max_new_tokens=9)
    assert answer.choices[0].message.content == want.text and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.prompt_tokens == want.usage.prompt_tokens
    assert answer.usage.completion_tokens == 9


@pytest.mark.parametrize("name", ["pirate", "pirate@0.5", "pirate+french", "pirate@0.5+french@-1"])
def test_a_patch_is_the_name_of_a_model(client: openai.OpenAI, model: PatchedModel, name: str) -> None:
    loaded = model.patches
    expressions = {
        "pirate": loaded["pirate"],
        "pirate@0.5": 0.5 * loaded["pirate"],
        "pirate+french": loaded["pirate"] + loaded["french"],
        "pirate@0.5+french@-1": 0.5 * loaded["pirate"] + -1.0 * loaded["french"],
    }
    want = model.generate(MESSAGES, patch=expressions[name], **SAMPLED)
    answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=12, temperature=1.0, seed=5)
    assert answer.choices[0].message.content == want and answer.model == name
    assert want != model.generate(MESSAGES, patch=None, **SAMPLED)


def test_the_field_patch_names_patches_beside_the_model(client: openai.OpenAI, model: PatchedModel) -> None:
    want = model.generate(MESSAGES, patch=0.8 * model.patches["pirate"] + model.patches["french"], **SAMPLED)
    for patch in ({"pirate": 0.8, "french": 1}, "pirate@0.8+french"):
        answer = client.chat.completions.create(
            model="tiny-llama",
            messages=MESSAGES,
            max_tokens=12,
            temperature=1.0,
            seed=5,
            extra_body={"patch": patch},
        )
        assert answer.choices[0].message.content == want


def test_a_stream_gives_the_same_text_and_its_usage(client: openai.OpenAI, model: PatchedModel) -> None:
    want = model.complete(MESSAGES, patch="pirate", max_new_tokens=9)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="pirate", messages=MESSAGES, max_tokens=9, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == want.text
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    plain = list(client.chat.completions.create(model="pirate", messages=MESSAGES, max_tokens=9, stream=True))
    assert all(chunk.usage is None for chunk in plain)


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI, model: PatchedModel) -> None:
    options: Any = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 6, "temperature": 1.5, "seed": 3, "n": 3}
    answer = client.chat.completions.create(**options)
    want = model.complete(MESSAGES, n=3, patch=None, max_new_tokens=6, temperature=1.5, seed=3)
    assert [choice.message.content for choice in answer.choices] == [result.text for result in want]
    assert answer.usage is not None and answer.usage.prompt_tokens == want[0].usage.prompt_tokens
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [result.text for result in want]


def test_logprobs_name_the_tokens_of_chats_and_streams(client: openai.OpenAI, model: PatchedModel) -> None:
    options: Any = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    want = model.complete(MESSAGES, patch=None, max_new_tokens=5, logprobs=2).logprobs
    assert want is not None
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None and whole.content is not None
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(stream=True, **options):
        for choice in chunk.choices:
            if choice.logprobs is not None and choice.logprobs.content is not None:
                streamed += choice.logprobs.content
    for tokens in (whole.content, streamed):
        assert [token.token for token in tokens] == [info.text for info in want]
        assert [token.logprob for token in tokens] == pytest.approx([info.logprob for info in want], abs=1e-4)
        assert all(len(token.top_logprobs) == 2 for token in tokens)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "remember"}}])
def test_tools_are_called(client: openai.OpenAI, choice: Any) -> None:
    pytest.importorskip("llguidance")
    options: Any = {"model": "tiny-llama", "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice}
    answer = client.chat.completions.create(max_tokens=300, temperature=0.5, seed=1, **options).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls is not None
    whole: list[Any] = list(answer.message.tool_calls)
    for call in whole:
        assert call.function.name == "remember" and call.function.arguments in ('{"name": "Ada"}', '{"name": "Bob"}')
    calls: list[Any] = []
    for chunk in client.chat.completions.create(max_tokens=300, temperature=0.5, seed=1, stream=True, **options):
        calls += [call for one in chunk.choices for call in one.delta.tool_calls or ()]
    assert [one.function.arguments for one in calls] == [one.function.arguments for one in whole]
    assert len(whole) <= (4 if choice == "required" else 1)


class Person(BaseModel):
    name: Literal["Ada", "Bob"]
    age: Literal[7, 8]


def test_parse_returns_an_object_of_the_class(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    answer = client.chat.completions.parse(
        model="pirate", messages=MESSAGES, response_format=Person, max_tokens=99, temperature=1.0, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    answer = client.chat.completions.create(
        model="tiny-llama", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=3
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_a_completion_continues_each_text(client: openai.OpenAI, model: PatchedModel) -> None:
    answer = client.completions.create(model="pirate", prompt=["One", "Two"], max_tokens=5, echo=True, logprobs=1)
    for choice, prompt in zip(answer.choices, ("One", "Two"), strict=True):
        assert choice.text == prompt + model.generate(prompt, raw=True, patch="pirate", max_new_tokens=5)
        assert choice.logprobs is not None and choice.logprobs.text_offset is not None
        assert choice.logprobs.text_offset[0] == len(prompt)
    parts = client.completions.create(model="pirate", prompt="One", max_tokens=5, stream=True)
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text.removeprefix("One")


def test_models_list_what_each_patch_can_do(client: openai.OpenAI, served: Running, model: PatchedModel) -> None:
    assert [card.id for card in client.models.list()] == ["tiny-llama", "french", "pirate"]
    card: Any = client.models.retrieve("pirate")
    capabilities = model.patches["pirate"].capabilities
    assert card.patch["capabilities"]["strength"] == capabilities.strength
    assert card.patch["capabilities"]["system"] == capabilities.system
    with served.http() as http:
        ModelList.model_validate(http.get("/v1/models").json())
        assert http.get("/v1/models/pirate@0.5+french").json()["id"] == "pirate@0.5+french"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_stop_of_null_takes_the_stop_strings_of_the_patch(
    client: openai.OpenAI, model: PatchedModel, stopping: Patch
) -> None:
    options: Any = {"model": "stopping", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    own = client.chat.completions.create(stop=None, **options).choices[0]
    none = client.chat.completions.create(stop=[], **options).choices[0]
    assert own.finish_reason == "stop" and none.finish_reason == "length"
    assert own.message.content == model.generate(MESSAGES, patch="stopping", **SAMPLED) != none.message.content


def test_bodies_are_what_the_document_says(served: Running) -> None:
    with served.http() as http:
        chat = http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 1})
        ChatCompletion.model_validate(chat.json())
        text = http.post("/v1/completions", json={"model": "pirate", "prompt": "x", "max_tokens": 2, "logprobs": 1})
        TextCompletion.model_validate(text.json())

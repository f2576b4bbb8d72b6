"""The result of a completion: the same text, ids and reason as its stream, with figures and log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.committed import private_copy, with_settings
from tp_runtime import PatchedModel
from tp_runtime.errors import PatchTargetError, RequestError
from tp_runtime.generation import Sampling

PROMPT = "How do I learn to swim?"


@pytest.fixture(scope="module")
def model(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1)


def test_the_result_is_what_the_stream_gave(model: PatchedModel) -> None:
    stream = model.stream(PROMPT, max_new_tokens=9)
    with pytest.raises(RequestError, match="the completion has not ended"):
        _ = stream.result
    text = "".join(stream)
    result = model.complete(PROMPT, max_new_tokens=9)
    assert result.text == text == stream.result.text == model.generate(PROMPT, max_new_tokens=9)
    assert list(result.token_ids) == stream.token_ids and result.finish_reason == stream.finish_reason
    assert result.usage.prompt_tokens == stream.prompt_tokens
    assert result.usage.total_tokens == stream.prompt_tokens + len(result.token_ids)
    assert result.timings.first_token is not None and result.timings.tokens == len(result.token_ids)
    assert result.logprobs is None and result.tool_calls == () and result.reasoning is None


def test_logprobs_name_each_token_of_the_result(model: PatchedModel) -> None:
    result = model.complete(PROMPT, max_new_tokens=6, logprobs=3)
    assert result.logprobs is not None
    assert [info.token for info in result.logprobs] == list(result.token_ids)
    for info in result.logprobs:
        assert info.top[0].token == info.token and info.top[0].logprob == info.logprob  # greedy takes the likeliest
        assert len(info.top) == 3 and info.top[1].logprob <= info.logprob <= 0
    prompt = model.codec.render(PROMPT)
    logits = model.logits([*prompt, *result.token_ids])[len(prompt) - 1 : -1].astype(np.float64)
    total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    want = logits[np.arange(len(logits)), list(result.token_ids)] - total
    np.testing.assert_allclose([info.logprob for info in result.logprobs], want, atol=1e-4)


def test_logprobs_of_a_batch_are_those_of_single_requests(model: PatchedModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "logprobs": 2, "temperature": 1.0, "seed": 3}
    prompts = [PROMPT, "How far is the moon?"]
    for one, prompt in zip(model.complete(prompts, **options), prompts, strict=True):
        alone = model.complete(prompt, **options)
        assert one.token_ids == alone.token_ids and one.logprobs is not None and alone.logprobs is not None
        for mine, other in zip(one.logprobs, alone.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_n_answers_run_the_prompt_once(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, forward = [], model.graph.forward

    def counted(tokens: Any, *args: Any, **options: Any) -> Any:
        ran.append(len(tokens))
        return forward(tokens, *args, **options)

    monkeypatch.setattr(model.graph, "forward", counted)
    results = model.complete(PROMPT, n=3, max_new_tokens=4, temperature=1.5, seed=7)
    assert sum(ran) == results[0].usage.prompt_tokens - 1  # the batch runs the last id of the prompt in its first step
    assert len({result.token_ids for result in results}) == 3
    for answer, result in enumerate(results):
        alone = model.complete(PROMPT, max_new_tokens=4, temperature=1.5, seed=7 + answer)
        assert alone.token_ids == result.token_ids


def test_n_answers_under_many_entries_run_the_prompt_once(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    absorbed = model.absorb("Be brief. " * 40)
    ran, forward = [], model.graph.forward

    def counted(tokens: Any, *args: Any, **options: Any) -> Any:
        ran.append(len(tokens))
        return forward(tokens, *args, **options)

    monkeypatch.setattr(model.graph, "forward", counted)
    model.complete(PROMPT, n=3, patch=absorbed, max_new_tokens=3)
    once = sum(ran)
    ran.clear()
    model.complete(PROMPT, n=1, patch=absorbed, max_new_tokens=3)
    assert once == sum(ran)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        (PROMPT, {"n": 0}, "n"),
        ([PROMPT, PROMPT], {"n": 2}, "n"),
        (PROMPT, {"n": 2, "cache": object()}, "cache"),
        (PROMPT, {"logprobs": -1}, "logprobs"),
        (PROMPT, {"lookup": True}, "lookup"),
        (PROMPT, {"regex": "a", "grammar": "start: /a/"}, "grammar"),
        (PROMPT, {"sampling": "best"}, "sampling"),
        (PROMPT, {"logit_bias": {10**6: 1}}, "logit_bias"),
        (PROMPT, {"tool_choice": "required"}, "tool_choice"),
        (PROMPT, {"tools": [3], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools[0]"),
        ([PROMPT, PROMPT], {"tools": [[], None, None]}, "tools"),
        ([PROMPT, PROMPT], {"documents": [{"text": "x"}, 3]}, "documents[1]"),
    ],
)
def test_bad_options_are_refused_by_name(model: PatchedModel, prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        model.complete(prompt, **options)
    assert error.value.field == field


def test_a_list_of_tools_is_for_all_prompts_and_lists_of_them_are_for_each(tmp_path: Path) -> None:
    folder = private_copy("tiny-llama", tmp_path)
    with_settings(folder, "tokenizer_config.json", chat_template="{{ tools | tojson }} {{ documents | tojson }}")
    model = PatchedModel.from_pretrained(folder, "cpu", threads=1)
    tool = {"type": "function", "function": {"name": "f"}}
    options: dict[str, Any] = {"max_new_tokens": 3, "documents": [{"text": "x"}]}
    having, empty, none = (model.complete(PROMPT, tools=tools, **options) for tools in ([tool], [], None))
    assert len({one.usage.prompt_tokens for one in (having, empty, none)}) == 3
    for tools, wanted in (([tool], [having] * 2), ([[tool], None], [having, none]), ([[], [tool]], [empty, having])):
        found = model.complete([PROMPT, PROMPT], tools=tools, **options)
        for one, other in zip(found, wanted, strict=True):
            assert (one.usage.prompt_tokens, one.token_ids) == (other.usage.prompt_tokens, other.token_ids)


def test_a_completion_that_failed_has_no_result(model: PatchedModel) -> None:
    with model.batch() as batch:
        completion = batch.add(PROMPT, max_new_tokens=2)
        with pytest.raises(RequestError, match="the completion has no result"):
            _ = completion.result
        while batch.step():
            pass
        assert completion.result.text == completion.text
    with pytest.raises(PatchTargetError):
        model.complete(PROMPT, patch="nobody")


def test_the_models_own_sampling_is_taken_where_the_request_says_nothing(model: PatchedModel) -> None:
    assert model.codec.sampling == {}
    model.codec.sampling = {"temperature": 1.5, "top_k": 7}
    try:
        own = model.complete(PROMPT, sampling="model", seed=5, max_new_tokens=8)
        same = model.complete(PROMPT, sampling=Sampling(temperature=1.5, top_k=7, seed=5), max_new_tokens=8)
        assert own.token_ids == same.token_ids
        greedy = model.complete(PROMPT, sampling="model", temperature=0, max_new_tokens=8)
        assert greedy.token_ids == model.complete(PROMPT, max_new_tokens=8).token_ids
    finally:
        model.codec.sampling = {}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_constrained_completion_that_ends_is_what_the_schema_accepts(model: PatchedModel) -> None:
    pytest.importorskip("llguidance")
    for seed in range(4):
        options: dict[str, Any] = {"json_schema": SCHEMA, "temperature": 1.5, "seed": seed, "max_new_tokens": 64}
        result = model.complete(PROMPT, **options)
        assert result.finish_reason == "eos"
        value = json.loads(result.text)
        assert value["name"] in ("Ada", "Bob") and 0 <= value["age"] <= 99
        (row,) = model.complete([PROMPT], **options)
        assert row.text == result.text


def test_each_row_of_a_batch_has_a_constraint_of_its_own(model: PatchedModel) -> None:
    pytest.importorskip("llguidance")
    options: dict[str, Any] = {"regex": ["(yes|no)", None, "[0-9]{3}"], "max_new_tokens": 12, "temperature": 1.0}
    one, free, digits = model.generate([PROMPT, PROMPT, PROMPT], seed=[1, 2, 3], **options)
    assert one in ("yes", "no") and len(digits) == 3 and digits.isdigit()
    assert free == model.generate(PROMPT, temperature=1.0, seed=2, max_new_tokens=12)


def test_a_completion_that_is_cut_says_so(model: PatchedModel) -> None:
    pytest.importorskip("llguidance")
    result = model.complete(PROMPT, regex="[a-z]{200}", max_new_tokens=5)
    assert result.finish_reason == "length"


def test_a_required_tool_is_called_with_arguments_that_its_schema_accepts(model: PatchedModel) -> None:
    pytest.importorskip("llguidance")
    tool = {"type": "function", "function": {"name": "remember", "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "remember"}}
    result = model.complete(PROMPT, tools=[tool], tool_choice=choice, temperature=1.0, seed=1, max_new_tokens=99)
    assert result.finish_reason == "eos" and result.text.strip() == ""
    assert [call.name for call in result.tool_calls] == ["remember"]
    stream = model.stream(PROMPT, tools=[tool], tool_choice=choice, temperature=1.0, seed=1, max_new_tokens=99)
    assert "".join(stream)
    (call,), (wanted,) = stream.result.tool_calls, result.tool_calls
    assert (call.name, call.arguments) == (wanted.name, wanted.arguments)
    assert result.tool_calls[0].arguments["name"] in ("Ada", "Bob")


def test_a_tool_whose_schema_cannot_be_kept_to_is_refused_by_its_place(model: PatchedModel) -> None:
    pytest.importorskip("llguidance")
    tool = {"type": "function", "function": {"name": "remember", "parameters": {"not": {}}}}
    with pytest.raises(RequestError) as error:
        model.complete(PROMPT, tools=[tool], tool_choice="required")
    assert error.value.field == "tools[0].function.parameters.not"


def test_what_cannot_be_compiled_is_refused_before_anything_runs(model: PatchedModel) -> None:
    pytest.importorskip("llguidance")
    with model.batch() as batch:
        with pytest.raises(RequestError, match="json_schema"):
            batch.add(PROMPT, json_schema={"not": {"type": "string"}})
        assert batch.step() == []

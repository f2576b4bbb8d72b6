"""Text generation by a model: rendering, streaming, stopping, seeds, caches, and requests that are refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tp_runtime.errors import RequestError, StaleCacheError, TPError
from tp_runtime.generation import Sampling
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import SessionOptions, SessionSettings
from tp_runtime.text import Request
from tp_runtime.text.request import RequestOptions

PROMPT = "Where is the cat?"


def read(model: PatchedModel, prompt: Any = PROMPT, **options: Any) -> tuple[str, list[int], str | None]:
    """Read a stream to its end and return its text, token ids and finish reason."""
    stream = model.stream(prompt, **{"max_new_tokens": 24, **options})
    return "".join(stream), stream.token_ids, stream.finish_reason


def test_streamed_chunks_join_to_the_text_that_generate_returns(model: PatchedModel, patch: Patch) -> None:
    for options in ({}, {"patch": patch}, {"temperature": 1.5, "seed": 3}, {"raw": True}):
        stream = model.stream(PROMPT, max_new_tokens=24, **options)
        assert stream.finish_reason is None and stream.seconds_to_first_token is None
        chunks = list(stream)
        assert "".join(chunks) == model.generate(PROMPT, max_new_tokens=24, **options)
        assert "".join(chunks) == model.codec.decode(stream.token_ids)
        assert len(chunks) > 1 and all(chunks)
        assert len(stream.token_ids) == 24 and stream.finish_reason == "length"
        assert stream.seconds_to_first_token is not None
        assert 0 < stream.seconds_to_first_token < stream.seconds


def test_a_string_is_one_user_message(model: PatchedModel) -> None:
    as_message = model.stream([{"role": "user", "content": PROMPT}], max_new_tokens=24)
    as_string = model.stream(PROMPT, max_new_tokens=24)
    assert as_message.prompt_tokens == as_string.prompt_tokens == len(model.codec.render(PROMPT))
    assert list(as_message) == list(as_string)
    assert as_message.token_ids == as_string.token_ids


def test_system_and_raw_prompts_change_the_completion(model: PatchedModel) -> None:
    plain, system, raw = (read(model, **options)[1] for options in ({}, {"system": "Speak."}, {"raw": True}))
    explicit = [{"role": "system", "content": "Speak."}, {"role": "user", "content": PROMPT}]
    assert system == read(model, explicit)[1]
    assert len({tuple(ids) for ids in (plain, system, raw)}) == 3


def test_greedy_ids_are_the_argmax_of_the_logits(model: PatchedModel, patch: Patch) -> None:
    for choice in (None, patch):
        prompt = model.codec.render(PROMPT)
        _text, ids, _reason = read(model, patch=choice)
        logits = model.logits([*prompt, *ids], patch=choice)
        assert logits.shape == (len(prompt) + 24, model.graph.folder.vocab_size) and logits.dtype == np.float32
        assert logits.argmax(1)[len(prompt) - 1 : -1].tolist() == ids


def test_a_completion_ends_at_an_eos_id_and_leaves_it_out_of_the_text(model: PatchedModel) -> None:
    _text, ids, _reason = read(model)
    stop = 1 + next(i for i in range(1, 24) if ids[i] not in ids[:i])
    model.codec.eos_ids = frozenset({ids[stop - 1]})
    text, ended, reason = read(model)
    assert (ended, reason) == (ids[:stop], "eos")
    assert text == model.codec.decode(ids[: stop - 1])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_stop_string_ends_the_text_before_it(model: PatchedModel, data: st.DataObject) -> None:
    whole, ids, _reason = read(model, seed=4, temperature=2.0)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 6))]
    text, stopped_ids, reason = read(model, seed=4, temperature=2.0, stop=["not in there", stop])
    assert text == whole[: whole.index(stop)]
    assert reason == "stop" and stopped_ids == ids[: len(stopped_ids)]


def test_seeds_make_draws_repeatable(model: PatchedModel) -> None:
    drawn = [read(model, temperature=2.0, seed=seed)[1] for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != read(model)[1] == read(model, seed=9)[1]  # greedy decoding ignores the seed


def test_a_stream_is_lazy_and_can_be_closed(model: PatchedModel) -> None:
    cache = model.new_cache()
    stream = model.stream(PROMPT, cache=cache)
    assert len(cache) == 0
    assert next(stream) is not None
    held = len(cache)
    stream.close()
    assert list(stream) == [] and len(cache) == held and len(stream.token_ids) < 24
    model.stream(PROMPT, cache=cache).close()  # this stream never began
    assert len(cache) == held


def test_a_conversation_on_a_cache_gives_the_same_answer_and_runs_fewer_tokens(
    model: PatchedModel, patch: Patch
) -> None:
    cache = model.new_cache(patch)
    first = "Where is the cat?" * 3
    answer = model.generate(first, patch=patch, cache=cache, max_new_tokens=9)
    held = list(cache.tokens)
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And the dog?"},
    ]
    ran: list[int] = []
    forward = model.graph.forward
    model.graph.forward = lambda tokens, *a, **k: ran.append(len(tokens)) or forward(tokens, *a, **k)  # type: ignore
    try:
        with_cache = read(model, messages, patch=patch, cache=cache)
    finally:
        del model.graph.forward
    assert with_cache == read(model, messages, patch=patch)
    assert ran[0] <= len(model.codec.render(messages)) - len(model.codec.render(first)) + 3
    assert cache.tokens[: len(model.codec.render(first))] == held[: len(model.codec.render(first))]


def test_a_cache_of_another_patch_is_refused_and_still_works_with_its_own(model: PatchedModel, patch: Patch) -> None:
    cache = model.new_cache(patch)
    model.generate(PROMPT, patch=patch, cache=cache, max_new_tokens=5)
    held = list(cache.tokens)
    for other in (None, 0.5 * patch, -patch, patch + patch):
        with pytest.raises(StaleCacheError):
            model.stream("Something else", patch=other, cache=cache)
    with pytest.raises(StaleCacheError):
        model.stream("Something else", patch=patch, strength=0, cache=cache)
    assert cache.tokens == held
    assert read(model, patch=patch, cache=cache) == read(model, patch=patch)
    # A patch of strength 0 is the base, so it can use a cache of the base.
    assert read(model, patch=patch, strength=0, cache=model.new_cache(None)) == read(model, patch=None)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": ""}, "messages"),
        ({"prompt": "  \n"}, "messages"),
        ({"prompt": []}, "messages"),
        ({"prompt": [{"role": "user"}]}, "messages[0].content"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": "x" * 600, "raw": True}, "prompt"),
        ({"prompt": [{"role": "user", "content": "x" * 300}] * 2}, "prompt"),
        ({"system": "S", "raw": True}, "system"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -3}, "seed"),
        ({"stop": "abc"}, "stop"),
        ({"stop": [""]}, "stop[0]"),
    ],
)
def test_requests_that_cannot_be_served_raise_at_once(model: PatchedModel, options: dict[str, Any], field: str) -> None:
    cache = model.new_cache()
    with pytest.raises(RequestError) as error:
        model.stream(**{"prompt": PROMPT, "cache": cache, **options})
    assert error.value.field == field
    assert len(cache) == 0


@pytest.mark.parametrize("ids", [[], [320], [-1], [0.5], list(range(300)) * 2])
def test_invalid_token_ids_are_refused(model: PatchedModel, ids: list[Any]) -> None:
    with pytest.raises(RequestError, match="tokens"):
        model.logits(ids)


def test_a_completion_style_model_continues_text(tiny_gemma_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_gemma_export, "cpu")
    model.codec.eos_ids = frozenset()
    stream = model.stream("dog: chien, cat:", max_new_tokens=5)
    assert stream.prompt_tokens == 1 + len("dog: chien, cat:")  # BOS and one token per byte
    assert "".join(stream) == model.generate("dog: chien, cat:", raw=True, max_new_tokens=5)
    with pytest.raises(RequestError, match="completion-style"):
        model.stream([{"role": "user", "content": "cat"}])


@pytest.mark.parametrize("patch", [42, 0.5, b"pirate", ["pirate"]])
def test_a_model_cannot_be_opened_with_an_object_that_is_not_a_patch(tiny_llama_export: Path, patch: Any) -> None:
    with pytest.raises(TPError, match="not a patch"):
        PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=patch)


def test_a_model_cannot_be_opened_with_a_patch_of_another_base(
    tiny_llama_export: Path, patch: Patch, tmp_path: Path
) -> None:
    foreign = Patch(patch.deltas, replace(patch.config, base_digest="0" * 64))
    foreign.save(tmp_path / "foreign.safetensors")
    for given_patch in (foreign, tmp_path / "foreign.safetensors", str(tmp_path / "foreign.safetensors")):
        with pytest.raises(TPError, match="base_digest"):
            PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=given_patch)


@pytest.mark.parametrize("threads", [0, -3, True, 1.5])
def test_an_invalid_number_of_threads_is_refused(tiny_llama_export: Path, threads: Any) -> None:
    with pytest.raises(RequestError, match="threads"):
        PatchedModel.from_pretrained(tiny_llama_export, device="cpu", threads=threads)


def test_the_typed_keyword_arguments_are_the_fields_of_the_settings() -> None:
    def names(*settings: type) -> set[str]:
        return {field.name for setting in settings for field in fields(setting)}

    assert SessionOptions.__annotations__.keys() == names(SessionSettings)
    assert RequestOptions.__annotations__.keys() == names(Request, Sampling) - {"prompt", "from_model"}

"""Batches of texts: each completion equals a single request's; joining, waiting, closing; patches in use; errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import patch_for
from tp_runtime.errors import PatchInUseError, PatchTargetError, PatchValueError, RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder
from tp_runtime.text import Completion, TextBatch

PROMPTS = ["Where is the cat?", "Hi", "How far is the moon from the earth?"]


@pytest.fixture(scope="module")
def other(tiny_llama_export: Path) -> Patch:
    return patch_for(ModelFolder.open(tiny_llama_export), seed=2, rank=9, scale=0.5)


def finish(batch: TextBatch) -> None:
    while batch.step():
        pass


def same(completion: Completion, model: PatchedModel, prompt: Any, **options: Any) -> bool:
    """Return whether a completion equals the stream of the same request."""
    stream = model.stream(prompt, **options)
    text = "".join(stream)
    return (text, stream.token_ids, stream.finish_reason, stream.prompt_tokens) == (
        completion.text,
        completion.token_ids,
        completion.finish_reason,
        completion.prompt_tokens,
    )


# -- several prompts -----------------------------------------------------------------------------------------


def test_several_prompts_return_their_texts_in_order(model: PatchedModel, patch: Patch, other: Patch) -> None:
    model.load_patch(patch, "p")
    options: dict[str, list[Any]] = {
        "patch": ["p", None, other],
        "strength": [0.5, 1.0, -1.0],
        "temperature": [0, 1.5, 1.5],
        "seed": [None, 3, 4],
        "max_new_tokens": [9, 5, 12],
        "system": [None, "Be brief.", "Be kind."],
    }
    single = [
        model.generate(prompt, **{name: values[number] for name, values in options.items()})
        for number, prompt in enumerate(PROMPTS)
    ]
    for rows in (8, 2, 1):
        assert model.generate(PROMPTS, rows=rows, **options) == single
    assert len(set(single)) == 3
    model.unload_patch("p")


def test_one_option_value_applies_to_every_prompt(model: PatchedModel, patch: Patch) -> None:
    options: dict[str, Any] = {"patch": patch, "temperature": 2.0, "seed": 5, "max_new_tokens": 8, "stop": ["a", "b"]}
    assert model.generate(PROMPTS, **options) == [model.generate(prompt, **options) for prompt in PROMPTS]
    with model.patched(patch):
        single = [model.generate(prompt, max_new_tokens=8, patch=patch) for prompt in PROMPTS]
        assert model.generate(PROMPTS, max_new_tokens=8) == single
    raw = [model.generate(prompt, raw=True, max_new_tokens=8) for prompt in PROMPTS]
    assert model.generate(PROMPTS, raw=True, max_new_tokens=8) == raw


def test_a_list_of_messages_is_one_conversation_and_a_list_of_lists_is_several(model: PatchedModel) -> None:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    text = model.generate(chats[0], max_new_tokens=6)
    assert isinstance(text, str) and text == model.generate(PROMPTS[0], max_new_tokens=6)
    texts = model.generate(chats, max_new_tokens=6)
    assert texts == model.generate(PROMPTS, max_new_tokens=6) and texts[0] == text
    assert model.generate([PROMPTS[0]], max_new_tokens=6) == [text]
    assert model.generate([PROMPTS[0], chats[0]], max_new_tokens=6) == [text, text]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "field"),
    [
        (["Hi", ""], {}, RequestError, "messages"),
        (["Hi", 7], {}, RequestError, "messages"),
        (["Hi", {"role": "user", "content": "Hi"}], {}, RequestError, "messages"),
        (["Hi", "x" * 600], {}, RequestError, "prompt"),
        (["Hi", "Hi"], {"max_new_tokens": [3, 0]}, RequestError, "max_new_tokens"),
        (["Hi", "Hi"], {"temperature": [0, -1]}, RequestError, "temperature"),
        (["Hi", "Hi"], {"seed": [1, 2, 3]}, RequestError, "seed"),
        (["Hi", "Hi"], {"patch": [None]}, RequestError, "patch"),
        (["Hi", "Hi"], {"patch": [None, "gone"]}, PatchTargetError, "patch"),
        (["Hi", "Hi"], {"patch": "p", "strength": [1, float("nan")]}, PatchValueError, "strength"),
        (["Hi", "Hi"], {"rows": 0}, RequestError, "rows"),
        (["Hi", "Hi"], {"stop": "abc"}, RequestError, "stop"),
        (["Hi", "Hi"], {"cache": None}, RequestError, "cache"),
    ],
)
def test_one_bad_prompt_is_refused_before_any_prompt_is_run(
    model: PatchedModel,
    patch: Patch,
    monkeypatch: pytest.MonkeyPatch,
    prompts: Any,
    options: dict[str, Any],
    error: Any,
    field: str,
) -> None:
    model.load_patch(patch, "p")
    monkeypatch.setattr(model.graph, "execute", lambda *_a, **_k: pytest.fail("something was run"))
    with pytest.raises(error) as raised:
        model.generate(prompts, **options)
    assert raised.value.field == field
    model.unload_patch("p")  # no request uses the patch


# -- a batch that stays open ---------------------------------------------------------------------------------


def test_completions_join_and_end_while_others_run(model: PatchedModel, patch: Patch, other: Patch) -> None:
    with model.batch(rows=2) as batch:
        one = batch.add(PROMPTS[0], patch=patch, max_new_tokens=12)
        assert batch.step()[0][0] is one and len(one.token_ids) == 1
        two = batch.add(PROMPTS[1], patch=other, strength=-1, max_new_tokens=4, temperature=2.0, seed=1)
        three = batch.add(PROMPTS[2], max_new_tokens=20, stop=["zzzz"])  # this one waits until another has ended
        chunks: dict[Completion, list[str]] = {one: [one.text], two: [], three: []}
        while stepped := batch.step():
            assert len(stepped) <= 2
            for completion, chunk in stepped:
                chunks[completion].append(chunk)
            if not two.finish_reason:
                assert three.token_ids == [] and three.finish_reason is None
    assert same(one, model, PROMPTS[0], patch=patch, max_new_tokens=12)
    assert same(two, model, PROMPTS[1], patch=other, strength=-1, max_new_tokens=4, temperature=2.0, seed=1)
    assert same(three, model, PROMPTS[2], max_new_tokens=20, stop=["zzzz"])
    for completion, texts in chunks.items():
        assert "".join(texts) == completion.text
        assert completion.seconds_to_first_token is not None
        assert 0 < completion.seconds_to_first_token <= completion.seconds


def test_eos_and_stop_strings_end_only_their_own_completion(model: PatchedModel) -> None:
    stream = model.stream(PROMPTS[0], max_new_tokens=24)
    text, ids = "".join(stream), stream.token_ids
    end = 1 + next(i for i in range(8, 24) if ids[i] not in ids[:i])
    model.codec.eos_ids = frozenset({ids[end - 1]})
    with model.batch() as batch:
        ended = batch.add(PROMPTS[0], max_new_tokens=24)
        stopped = batch.add(PROMPTS[0], max_new_tokens=24, stop=[text[1:2]])
        unaffected = batch.add(PROMPTS[2], max_new_tokens=24)
        finish(batch)
    assert (ended.finish_reason, stopped.finish_reason) == ("eos", "stop")
    for completion, prompt, options in (
        (ended, PROMPTS[0], {}),
        (stopped, PROMPTS[0], {"stop": [text[1:2]]}),
        (unaffected, PROMPTS[2], {}),
    ):
        assert same(completion, model, prompt, max_new_tokens=24, **options)


def test_closing_a_completion_makes_room_for_a_waiting_one(model: PatchedModel) -> None:
    with model.batch(rows=1) as batch:
        one, two, three = (batch.add(prompt, max_new_tokens=9) for prompt in PROMPTS)
        batch.step()
        two.close()  # this one waits
        one.close()  # this one runs
        one.close()
        finish(batch)
        unfinished = batch.add(PROMPTS[0])
        batch.step()
    assert [c.finish_reason for c in (one, two, three, unfinished)] == ["closed", "closed", "length", "closed"]
    assert len(one.token_ids) == 1 and two.token_ids == [] and same(three, model, PROMPTS[2], max_new_tokens=9)
    assert batch.step() == []
    with pytest.raises(RequestError, match="closed"):
        batch.add("Hi")


def test_a_patch_in_use_by_a_row_cannot_be_unloaded(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")
    with model.batch(rows=1) as batch:
        running, waiting = batch.add("Hi", patch="p", max_new_tokens=3), batch.add("Hi", patch="p", strength=0.5)
        batch.step()
        with pytest.raises(PatchInUseError, match="used 2 times"):
            model.unload_patch("p")
        waiting.close()
        with pytest.raises(PatchInUseError, match="used 1 times"):
            model.unload_patch("p")
        finish(batch)
        assert running.finish_reason == "length"
        model.unload_patch("p")
        model.load_patch(patch, "p")
        batch.add("Hi", patch="p")
        batch.step()
    model.unload_patch("p")  # the batch was closed


def test_a_prompt_that_fails_to_run_ends_only_its_own_completion(
    model: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.batch() as batch:
        good = batch.add(PROMPTS[0], max_new_tokens=5)
        batch.step()
        bad, late = batch.add(PROMPTS[1]), batch.add(PROMPTS[2], max_new_tokens=5)
        forward, calls = model.graph.forward, iter([True])
        monkeypatch.setattr(
            model.graph,
            "forward",
            lambda *a, **k: (_ for _ in ()).throw(MemoryError()) if next(calls, 0) else forward(*a, **k),
        )
        assert (bad, "") in batch.step()
        assert bad.finish_reason == "error" and isinstance(bad.error, MemoryError)
        finish(batch)
    monkeypatch.undo()
    assert same(good, model, PROMPTS[0], max_new_tokens=5) and same(late, model, PROMPTS[2], max_new_tokens=5)
    monkeypatch.setattr(model.graph, "forward", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        model.generate(PROMPTS)


def test_threads_can_add_to_a_running_batch(model: PatchedModel, patch: Patch) -> None:
    with model.batch(rows=3) as batch:
        added: list[tuple[int, Completion]] = []

        def add(number: int) -> None:
            choice = patch if number % 2 else None
            added.append((number, batch.add(PROMPTS[number % 3], patch=choice, max_new_tokens=6)))

        threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
            batch.step()
        for thread in threads:
            thread.join()
        finish(batch)
    assert len(added) == 8
    for number, completion in added:
        assert same(completion, model, PROMPTS[number % 3], patch=patch if number % 2 else None, max_new_tokens=6)

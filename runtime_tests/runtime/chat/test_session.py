"""Chats: what they remember, what they run, and what an edit, a retry, an undo and a switch change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests.prefixes import with_prefix
from runtime_tests.runtime.chat.conftest import Answers, Script
from tp_runtime.chat.stream import answer_message
from tp_runtime.errors import PatchTargetError, RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.text import Result, Timings, Usage


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# -- turns ---------------------------------------------------------------------------------------------------


def test_a_chat_answers_as_a_request_with_all_messages_does(model: PatchedModel, answer: Answers) -> None:
    chat, messages = model.chat(max_new_tokens=5), []
    for text in ("one", "two", "three"):
        messages.append(user(text))
        assert chat.send(text).text == answer(messages)
        messages.append(said(answer(messages)))
    assert chat.messages == messages


def test_a_turn_runs_only_its_new_tokens(model: PatchedModel, script: Script) -> None:
    chat = model.chat("Be brief.")
    for text in ("Where is the cat?", "And the dog?", "Thanks."):
        script.says("In the hall.")
        assert chat.send(text).text == "In the hall."
        # Every id of the dialogue ran once, up to the end-of-sequence id of the last answer and its line break.
        assert script.ran == model.codec.render(chat.messages, "Be brief.", add_generation_prompt=False)[:-2]


def test_an_answer_with_other_ids_when_encoded_again_is_run_again(model: PatchedModel, answer: Answers) -> None:
    chat = model.chat(max_new_tokens=5)
    text = chat.send("one").text
    assert "\ufffd" in text  # bytes that are no text
    assert chat.send("two").text == answer([user("one"), said(text), user("two")])


def test_a_tools_result_is_answered_within_the_turn(model: PatchedModel, script: Script) -> None:
    chat = model.chat()
    script.says("call add", "4", "8")
    chat.send("What is 2 + 2?")
    result = {"role": "tool", "content": "4"}
    assert chat.send(result).text == "4"
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    chat.send([{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}])
    assert [message["role"] for message in chat.messages][4:] == ["tool", "tool", "assistant"]
    assert len(chat.undo()) == 7 and chat.messages == []  # all of it is one turn


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_call_of_a_tool_is_part_of_the_answers_message(model: PatchedModel, script: Script, tmp_path: Path) -> None:
    chat = model.chat(tools=[ADD])
    script.says('{"name": "add", "arguments": {"a": 2, "b": 2}}', "It is 4.")
    result = chat.send("What is 2 + 2?")
    (call,) = result.tool_calls
    assert (call.name, call.arguments) == ("add", {"a": 2, "b": 2})
    assert chat.messages[1] == {"role": "assistant", "content": result.text, "tool_calls": [call.message_entry()]}
    chat.send({"role": "tool", "content": "4", "tool_call_id": call.id})
    chat.save(tmp_path / "chat.json")
    assert model.load_chat(tmp_path / "chat.json").messages == chat.messages
    assert [message["role"] for message in chat.undo()] == ["user", "assistant", "tool", "assistant"]


def test_reasoning_stands_beside_the_answers_text() -> None:
    result = Result("Yes.", (1, 2), "eos", Usage(3, 2), Timings(0.1, 0.2, 2), reasoning="Is it so?")
    assert answer_message(result) == {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it so?"}


def test_the_options_of_the_chat_count_for_every_answer_and_can_be_overridden(
    model: PatchedModel, answer: Answers
) -> None:
    chat = model.chat(max_new_tokens=3, temperature=1.0, seed=5)
    assert chat.send("one").text == answer([user("one")], max_new_tokens=3, temperature=1.0, seed=5)
    chat.clear()
    assert chat.send("one", max_new_tokens=7, seed=6).text == answer(
        [user("one")], max_new_tokens=7, temperature=1.0, seed=6
    )


def test_the_messages_are_a_copy_in_both_directions(model: PatchedModel, answer: Answers) -> None:
    chat, sent = model.chat(max_new_tokens=5), user("one")
    chat.send(sent)
    sent["content"] = "two"
    chat.messages[0]["content"] = "three"
    chat.messages.clear()
    assert chat.messages == [user("one"), said(answer([user("one")]))]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (5, "not a list"),
        ([], "no message"),
        ([5], "not an object"),
        ({}, "malformed"),
        ({"role": 5, "content": "x"}, "malformed"),
        ({"role": "user"}, "malformed"),
        ({"role": "user", "content": {1, 2}}, "JSON"),
        ({"role": "user", "content": "x", "weight": float("nan")}, "not finite"),
        ({"role": "user", "content": "x", "name": "\ud800"}, "Unicode"),
        ({"role": "system", "content": "x"}, "set_system"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "nothing to answer"),
        ("", "empty"),
        ("\udcff", "Unicode"),
    ],
)
def test_a_message_that_is_refused_changes_nothing(model: PatchedModel, message: Any, problem: str) -> None:
    chat = model.chat(max_new_tokens=5)
    chat.send("one")
    before = chat.messages
    with pytest.raises(RequestError, match=problem):
        chat.send(message)
    assert chat.messages == before


@pytest.mark.parametrize("name", ["system", "patch", "strength", "raw", "cache"])
def test_a_setting_of_the_whole_chat_is_no_option_of_an_answer(model: PatchedModel, name: str) -> None:
    chat = model.chat()
    with pytest.raises(RequestError, match=name):
        chat.send("one", **{name: None})


@pytest.mark.parametrize(
    "options", [{"overflow": "wrap"}, {"temperature": -1}, {"system": 5}, {"system": "\ud800"}, {"max_new_tokens": 0}]
)
def test_a_setting_that_is_not_valid_is_refused_before_the_first_message(
    model: PatchedModel, options: dict[str, Any]
) -> None:
    with pytest.raises(RequestError):
        model.chat(**options)


def test_a_completion_style_model_has_no_chats(tiny_gemma_export: Any) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        PatchedModel.from_pretrained(tiny_gemma_export, "cpu").chat()


# -- the last turn -------------------------------------------------------------------------------------------


def test_an_edit_runs_from_the_changed_message_on(model: PatchedModel, script: Script) -> None:
    chat = model.chat()
    script.says("In the hall.", "It is asleep.", "It is awake.")
    chat.send("Where is the cat?")
    chat.send("What does it do?")
    script.ran.clear()
    assert chat.edit_last("What does it see?").text == "It is awake."
    assert [message["content"] for message in chat.messages] == [
        "Where is the cat?", "In the hall.", "What does it see?", "It is awake."
    ]  # fmt: skip
    whole = model.codec.render(chat.messages, add_generation_prompt=False)[:-2]
    assert script.ran == whole[len(whole) - len(script.ran) :]
    assert script.ran[:4] == model.codec.render("see?", raw=True)  # "What does it " ran before


def test_a_retry_of_a_greedy_answer_is_the_same_answer(model: PatchedModel) -> None:
    chat = model.chat(max_new_tokens=5)
    chat.send("one")
    before = chat.messages
    assert chat.retry().text == before[-1]["content"]
    assert chat.messages == before


def test_a_retry_of_a_sampled_answer_counts_the_seed_on(model: PatchedModel, answer: Answers) -> None:
    chat = model.chat(max_new_tokens=5, temperature=1.0, seed=7)
    chat.send("one")
    for seed in (8, 9):
        wanted = answer([user("one")], temperature=1.0, seed=seed)
        assert chat.retry().text == wanted == chat.messages[-1]["content"]
    assert chat.retry(seed=3).text == answer([user("one")], temperature=1.0, seed=3)
    text = chat.messages[-1]["content"]
    chat.send("two")  # the next turn begins with the chat's own seed
    assert chat.messages[-1]["content"] == answer([user("one"), said(text), user("two")], temperature=1.0, seed=7)


def test_a_retry_answers_the_user_message_again_and_not_the_tools_result(model: PatchedModel, script: Script) -> None:
    chat = model.chat()
    script.says("call add", "5", "4, I think")
    chat.send("What is 2 + 2?")
    chat.send({"role": "tool", "content": "4"})
    assert chat.retry().text == "4, I think"
    assert chat.messages == [user("What is 2 + 2?"), said("4, I think")]


def test_undo_takes_the_last_turn_back(model: PatchedModel, answer: Answers) -> None:
    chat = model.chat(max_new_tokens=5)
    first = chat.send("one").text
    second = chat.send("two").text
    assert chat.undo() == [user("two"), said(second)]
    assert chat.messages == [user("one"), said(first)]
    assert chat.send("three").text == answer([user("one"), said(first), user("three")])


@pytest.mark.parametrize("call", ["undo", "retry", "edit_last"])
def test_a_chat_without_a_turn_has_none_to_change(model: PatchedModel, call: str) -> None:
    chat = model.chat()
    with pytest.raises(RequestError, match="no turn yet"):
        getattr(chat, call)(*(["x"] if call == "edit_last" else []))


def test_clear_forgets_the_messages_and_keeps_the_rest(model: PatchedModel, patch: Patch, answer: Answers) -> None:
    chat = model.chat("Be brief.", patch, max_new_tokens=5)
    chat.send("one")
    chat.clear()
    assert chat.messages == [] and chat.system == "Be brief." and chat.patch is patch
    assert chat.send("two").text == answer([user("two")], system="Be brief.", patch=patch)


# -- patches and the system message --------------------------------------------------------------------------


def test_a_switch_runs_the_dialogue_again_under_the_other_patch(
    model: PatchedModel, patch: Patch, answer: Answers
) -> None:
    model.load_patch(patch, "p")
    chat, messages = model.chat(max_new_tokens=5), []
    settings: list[tuple[Any, float]] = [(None, 1.0), ("p", 1.0), ("p", -0.5), (patch, 2.0), (None, 1.0)]
    for chosen, strength in settings:
        chat.switch(chosen, strength)
        assert chat.runs_again == bool(messages)
        messages.append(user("go on"))
        wanted = answer(messages, patch=chosen, strength=strength)
        assert chat.send("go on").text == wanted
        assert not chat.runs_again
        messages.append(said(wanted))
    assert (chat.patch, chat.strength) == settings[-1]


def test_a_switch_to_the_same_patch_runs_nothing_again(model: PatchedModel, patch: Patch, script: Script) -> None:
    model.load_patch(patch, "p")
    chat = model.chat(patch="p")
    script.says("a", "b")
    chat.send("one")
    chat.switch(patch)  # the same values under no name
    assert not chat.runs_again
    chat.switch(None)
    chat.switch("p")
    assert not chat.runs_again
    chat.send("two")
    assert script.ran == model.codec.render(chat.messages, add_generation_prompt=False)[:-2]


def test_a_chat_that_names_no_patch_follows_the_active_one(model: PatchedModel, patch: Patch, answer: Answers) -> None:
    chat = model.chat(max_new_tokens=5)
    first = chat.send("one").text
    messages = [user("one"), said(first), user("two")]
    with model.patched(patch):
        assert chat.runs_again
        second = chat.send("two").text
        assert second == answer(messages)
    messages += [said(second), user("three")]
    assert chat.send("three").text == answer(messages)


def test_another_patch_under_the_same_name_is_another_patch(model: PatchedModel, patch: Patch, answer: Answers) -> None:
    model.load_patch(patch, "p")
    chat = model.chat(patch="p", max_new_tokens=5)
    first = chat.send("one").text
    model.unload_patch("p")
    before = chat.messages
    with pytest.raises(PatchTargetError):
        chat.send("two")
    assert chat.messages == before
    model.load_patch(-1 * patch, "p")
    assert chat.send("two").text == answer([user("one"), said(first), user("two")], patch=-1 * patch)


def test_a_patch_that_cannot_be_had_changes_nothing(model: PatchedModel, patch: Patch, answer: Answers) -> None:
    chat = model.chat(patch=patch, strength=2.0, max_new_tokens=5)
    chat.send("one")
    before = chat.messages
    for bad, strength in (("nothing", 1.0), (None, 2.0), (5, 1.0)):
        with pytest.raises(PatchTargetError):
            chat.switch(bad, strength)  # type: ignore[arg-type]
    assert (chat.patch, chat.strength, chat.messages) == (patch, 2.0, before)
    assert not chat.runs_again


def test_a_new_system_message_stands_in_front_from_the_next_message_on(model: PatchedModel, answer: Answers) -> None:
    chat = model.chat(max_new_tokens=5)
    first = chat.send("one").text
    messages = [user("one"), said(first), user("two")]
    chat.set_system("Be loud.")
    second = chat.send("two").text
    assert second == answer(messages, system="Be loud.")
    chat.set_system(None)
    messages += [said(second), user("three")]
    assert chat.send("three").text == answer(messages)
    assert chat.messages[0] == user("one")


def test_entries_stand_where_a_system_message_would(model: PatchedModel, patch: Patch) -> None:
    start = model.codec.render("x")[:3]
    entries = with_prefix(patch, model.graph.folder, start)
    with pytest.raises(RequestError, match="entries stand"):
        model.chat("Be brief.", entries)
    chat = model.chat("Be brief.", max_new_tokens=5)
    with pytest.raises(RequestError, match="entries stand"):
        chat.switch(entries)
    assert chat.patch is not entries
    chat.set_system(None)
    chat.switch(entries)
    chat.send("one")
    with pytest.raises(RequestError, match="entries stand"):
        chat.set_system("Be brief.")
    assert chat.system is None


def test_a_chat_under_entries_runs_only_its_new_tokens(model: PatchedModel, patch: Patch, script: Script) -> None:
    start = model.codec.render("x")[:3]
    chat = model.chat(patch=with_prefix(patch, model.graph.folder, start))
    for text in ("Where is the cat?", "And the dog?"):
        script.says("In the hall.")
        chat.send(text)
        assert script.ran == model.codec.render(chat.messages, add_generation_prompt=False)[3:-2]

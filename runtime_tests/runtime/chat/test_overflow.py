"""A chat that fills the context window: an error, or answers without the oldest turns."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from runtime_tests.prefixes import with_prefix
from runtime_tests.runtime.chat.conftest import Answers, Script
from runtime_tests.runtime.chat.test_session import said, user
from tp_runtime.errors import RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

LONG = "x" * 130  # 130 tokens of the 512 that the window has


def test_a_full_window_is_an_error_that_changes_nothing(model: PatchedModel, answer: Answers) -> None:
    chat = model.chat(max_new_tokens=5)
    for _ in range(2):
        chat.send(LONG)
    before = chat.messages
    with pytest.raises(RequestError, match="leaves no room in the context window"):
        chat.send(LONG * 2)
    assert chat.messages == before
    assert chat.send("go on").text == answer([*before, user("go on")])


def test_the_oldest_turns_are_left_out_until_prompt_and_answer_fit(
    model: PatchedModel, answer: Answers, caplog: pytest.LogCaptureFixture
) -> None:
    chat = model.chat("Be brief.", overflow="drop_oldest", max_new_tokens=5)
    messages: list[dict[str, Any]] = []
    dropped = []
    for number in range(6):
        messages.append(user(f"{number}" + LONG))
        with caplog.at_level(logging.WARNING, "tp_runtime"), chat.stream(messages[-1]) as stream:
            text = "".join(stream)
        dropped.append(stream.dropped_turns)
        seen = messages[2 * stream.dropped_turns :]
        assert len(model.codec.render(seen, "Be brief.")) + 5 <= 512
        if stream.dropped_turns:
            more = messages[2 * stream.dropped_turns - 2 :]
            assert len(model.codec.render(more, "Be brief.")) + 5 > 512  # no turn was left out without need
        assert text == answer(seen, system="Be brief.")
        messages.append(said(text))
    assert dropped == sorted(dropped) and dropped[0] == 0 and dropped[-1] > 1
    assert chat.messages == messages  # the chat itself forgets nothing
    assert f"does not see the oldest turns ({dropped[-1]})" in caplog.text


def test_a_shorter_answer_leaves_room_for_more_turns(model: PatchedModel) -> None:
    chat = model.chat(overflow="drop_oldest", max_new_tokens=5)
    for _ in range(2):
        chat.send(LONG)
    with chat.stream("short", max_new_tokens=300) as long:
        pass
    with chat.stream("short", max_new_tokens=5) as short:
        pass
    assert (long.dropped_turns, short.dropped_turns) == (1, 0)


def test_a_turn_goes_with_its_tool_messages_or_not_at_all(model: PatchedModel, script: Script) -> None:
    chat = model.chat(overflow="drop_oldest", max_new_tokens=30)
    script.says("call", "yes", "no", "fine")
    chat.send("x" * 100)
    chat.send({"role": "tool", "content": "x" * 100})
    chat.send("y" * 100)
    script.ran.clear()
    with chat.stream("z" * 150) as stream:
        "".join(stream)
    assert stream.dropped_turns == 1
    seen = [user("y" * 100), said("no"), user("z" * 150), said("fine")]
    whole = model.codec.render(seen, add_generation_prompt=False)[:-2]
    assert script.ran == whole[len(whole) - len(script.ran) :]  # the system message that the template adds ran before


@pytest.mark.parametrize("overflow", ["error", "drop_oldest"])
def test_a_last_turn_that_does_not_fit_alone_is_an_error(model: PatchedModel, overflow: Any) -> None:
    chat = model.chat(overflow=overflow, max_new_tokens=5)
    chat.send("one")
    before = chat.messages
    with pytest.raises(RequestError, match="context window"):
        chat.send("x" * 512)
    if overflow == "drop_oldest":
        with pytest.raises(RequestError, match="max_new_tokens=600"):
            chat.send("two", max_new_tokens=600)
    assert chat.messages == before


def test_the_entries_of_a_patch_stay(model: PatchedModel, patch: Patch, answer: Answers) -> None:
    start = model.codec.render("x")[:3]
    entries = with_prefix(patch, model.graph.folder, start, position=200)  # 197 positions more than their ids
    chat = model.chat(patch=entries, overflow="drop_oldest", max_new_tokens=5)
    messages: list[dict[str, Any]] = []
    for number in range(3):
        messages.append(user(f"{number}" + LONG))
        with chat.stream(messages[-1]) as stream:
            text = "".join(stream)
        assert stream.dropped_turns == number
        assert text == answer(messages[2 * number :], patch=entries)
        messages.append(said(text))


def test_what_an_undo_makes_room_for_is_seen_again(model: PatchedModel, answer: Answers) -> None:
    chat = model.chat(overflow="drop_oldest", max_new_tokens=5)
    for _ in range(5):
        chat.send(LONG)
    for _ in range(3):
        chat.undo()
    messages = [*chat.messages, user("go on")]
    assert chat.send("go on").text == answer(messages)

"""Answers of a chat while they are given: what ends them, and what the chat is afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from runtime_tests.interrupts import interrupted_at_every_step
from runtime_tests.runtime.chat.conftest import Answers
from runtime_tests.runtime.chat.test_session import said, user
from tp_runtime.chat import ChatSession
from tp_runtime.errors import BusyError, ModelFormatError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

# With these draws the answers of the tiny model have several chunks.
DRAWN: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "seed": 2}


@pytest.fixture
def chat(model: PatchedModel) -> ChatSession:
    """A chat after its first turn."""
    chat = model.chat(**DRAWN)
    chat.send("one")
    return chat


def check_that_it_goes_on(chat: ChatSession, answer: Answers) -> None:
    """Check that the chat answers as a request does that runs all of its messages."""
    messages = [*chat.messages, user("go on")]
    assert chat.send("go on").text == answer(messages, **DRAWN)
    chat.undo()


def test_the_last_chunk_appends_the_message_and_the_answer_together(chat: ChatSession, answer: Answers) -> None:
    before = chat.messages
    stream, text = chat.stream("two"), ""
    for chunk in stream:
        assert chat.messages == before or stream.finish_reason
        text += chunk
    assert stream.finish_reason == "length"
    assert chat.messages == [*before, user("two"), said(text)]
    assert stream.text == text == answer([*before, user("two")], **DRAWN)
    stream.close()
    assert len(chat.messages) == 4  # closing after the end has no effect
    assert stream.stop()


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("end", ["close", "drop", "block"])
def test_an_answer_that_is_closed_leaves_the_chat_as_it_was(
    chat: ChatSession, answer: Answers, chunks: int, end: str
) -> None:
    before = chat.messages
    stream = chat.stream("two")
    for _ in range(chunks):
        next(stream)
    if end == "close":
        stream.close()
        assert next(stream, None) is None
        assert not stream.stop()
    elif end == "block":
        with stream:
            pass
    del stream
    assert chat.messages == before
    check_that_it_goes_on(chat, answer)


def test_an_answer_that_is_stopped_becomes_what_was_said_so_far(chat: ChatSession, answer: Answers) -> None:
    before = chat.messages
    stream = chat.stream("two")
    text = next(stream) + next(stream)
    assert stream.stop()
    assert chat.messages == [*before, user("two"), said(text)]
    assert next(stream, None) is None
    check_that_it_goes_on(chat, answer)


def test_an_answer_that_is_stopped_before_the_first_word_is_forgotten(chat: ChatSession, answer: Answers) -> None:
    before = chat.messages
    stream = chat.stream("two")
    assert not stream.stop()
    assert chat.messages == before
    check_that_it_goes_on(chat, answer)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelFormatError, MemoryError])
def test_an_error_in_the_middle_of_an_answer_leaves_the_chat_as_it_was(
    chat: ChatSession, answer: Answers, model: PatchedModel, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, runs, forward = chat.messages, [], model.graph.forward

    def fail(*args: Any, **options: Any) -> Any:
        runs.append(args)
        if len(runs) == 3:
            raise error("x")
        return forward(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model.graph, "forward", fail)
        for call in (chat.send, chat.edit_last):
            runs.clear()
            with pytest.raises(error):
                call("two")
            assert chat.messages == before
        runs.clear()
        with pytest.raises(error):
            chat.retry()
    assert chat.messages == before
    check_that_it_goes_on(chat, answer)


def test_ctrl_c_keeps_what_was_said_if_the_stream_is_stopped_then(
    chat: ChatSession, answer: Answers, model: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = chat.messages
    stream = chat.stream("two")
    text = next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(model.graph, "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert stream.stop()
    assert chat.messages == [*before, user("two"), said(text)]
    check_that_it_goes_on(chat, answer)


def test_nothing_else_changes_the_chat_while_an_answer_is_given(chat: ChatSession, patch: Patch) -> None:
    before = chat.messages
    stream = chat.stream("two")
    next(stream)
    calls = [
        lambda: chat.stream("three"),
        lambda: chat.send("three"),
        chat.retry,
        lambda: chat.edit_last("three"),
        chat.undo,
        chat.clear,
        lambda: chat.switch(patch),
        lambda: chat.set_system("Be brief."),
    ]
    for call in calls:
        with pytest.raises(BusyError, match="giving an answer"):
            call()
    assert chat.messages == before and chat.system is None
    text = stream.text + "".join(stream)
    assert chat.messages == [*before, user("two"), said(text)]
    chat.undo()


def test_a_second_reader_of_a_stream_is_refused_and_the_first_goes_on(
    chat: ChatSession, model: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, reached, go = model.graph.forward, threading.Event(), threading.Event()

    def wait(*args: Any, **options: Any) -> Any:
        reached.set()
        assert go.wait(60)
        return forward(*args, **options)

    monkeypatch.setattr(model.graph, "forward", wait)
    stream = chat.stream("two")
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert reached.wait(60)
    with pytest.raises(BusyError, match="being read"):
        next(stream)
    go.set()
    reader.join()
    assert len(chat.messages) == 4


@pytest.mark.parametrize("end", ["close", "stop"])
def test_another_thread_may_end_an_answer(
    chat: ChatSession, answer: Answers, model: PatchedModel, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, forward, runs = chat.messages, model.graph.forward, []
    reached, go = threading.Event(), threading.Event()

    def wait(*args: Any, **options: Any) -> Any:
        runs.append(args)
        if len(runs) == 3:
            reached.set()
            assert go.wait(60)
        return forward(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model.graph, "forward", wait)
        stream = chat.stream("two")
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        assert reached.wait(60)
        getattr(stream, end)()
        go.set()
        reader.join()
    assert chat.messages[: len(before)] == before
    assert len(chat.messages) == len(before) + (2 if end == "stop" else 0)
    check_that_it_goes_on(chat, answer)


# -- Ctrl-C at every line ------------------------------------------------------------------------------------

FILES = ("tp_runtime/chat/session.py", "chat/stream.py", "chat/state.py", "chat/turns.py")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", ["send", "stop", "edit", "retry", "undo", "switch", "system", "clear"])
def test_an_interrupt_at_any_line_changes_the_whole_chat_or_nothing(
    model: PatchedModel, patch: Patch, answer: Answers, call: str
) -> None:
    def stop(chat: ChatSession) -> None:
        stream = chat.stream("two")
        next(stream)
        stream.stop()

    actions: dict[str, Any] = {
        "send": lambda chat: chat.send("two"),
        "stop": stop,
        "edit": lambda chat: chat.edit_last("two"),
        "retry": lambda chat: chat.retry(temperature=1.0, seed=1),
        "undo": lambda chat: chat.undo(),
        "switch": lambda chat: chat.switch(patch, -1.0),
        "system": lambda chat: chat.set_system("Be loud."),
        "clear": lambda chat: chat.clear(),
    }

    drawn = {**DRAWN, "max_new_tokens": 2}

    def fresh() -> ChatSession:
        chat = model.chat(overflow="drop_oldest", **drawn)
        chat.send("one")
        return chat

    def state(chat: ChatSession) -> Any:
        return chat.messages, chat.system, chat.patch, chat.strength

    chat = fresh()
    before = state(chat)
    actions[call](chat)
    after = state(chat)
    assert after != before
    chats: Iterator[ChatSession] = iter(fresh, None)
    chat = next(chats)

    def act() -> None:
        actions[call](chat)

    for place in interrupted_at_every_step(act, FILES):
        assert state(chat) in (before, after), place
        messages = [*chat.messages, user("go on")]
        wanted = answer(messages, system=chat.system, patch=chat.patch, strength=chat.strength, **drawn)
        assert chat.send("go on").text == wanted, place
        chat = next(chats)

"""Saved chats: what is in the file, what a load finds, and every file that is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import patch_for
from runtime_tests.runtime.chat.conftest import Answers, Script
from runtime_tests.runtime.chat.test_session import said, user
from tp_runtime.chat import saved
from tp_runtime.errors import ChatFormatError, OutputError, PatchTargetError, RequestError
from tp_runtime.model import ACTIVE, PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder


@pytest.fixture(scope="module")
def other(tiny_llama_export: Path) -> Patch:
    return patch_for(ModelFolder.open(tiny_llama_export), seed=2, scale=0.5)


def test_a_loaded_chat_goes_on_where_the_saved_one_was(model: PatchedModel, tmp_path: Path) -> None:
    chat = model.chat("Be brief.", overflow="drop_oldest", max_new_tokens=5)
    for text in ("one", "zwei ä 🙂"):
        chat.send(text)
    chat.save(tmp_path / "chat.json")
    loaded = model.load_chat(tmp_path / "chat.json", max_new_tokens=5)
    assert (loaded.messages, loaded.system) == (chat.messages, "Be brief.")
    assert loaded.runs_again
    assert loaded.send("three").text == chat.send("three").text


def test_the_file_holds_what_a_reader_needs_and_no_more(
    model: PatchedModel, patch: Patch, script: Script, tmp_path: Path
) -> None:
    model.load_patch(patch, "p")
    chat = model.chat("Be brief.", "p", 0.5)
    script.says("zwei")
    chat.send("eins")
    chat.save(tmp_path / "chat.json")
    folder = model.graph.folder
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8")) == {
        "format": "tp-runtime chat",
        "version": 1,
        "base_model": folder.base_model,
        "base_digest": folder.base_digest,
        "system": "Be brief.",
        "patch": {
            "choice": "named",
            "name": "p",
            "strength": 0.5,
            "terms": [{"identity": patch.identity, "strength": 0.5}],
        },
        "messages": [user("eins"), said("zwei")],
    }


def test_a_loaded_chat_runs_under_the_patch_that_it_was_saved_under(
    model: PatchedModel, patch: Patch, other: Patch, answer: Answers, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    for number, (chosen, strength) in enumerate(
        [(None, 1.0), (ACTIVE, 1.0), ("p", 1.0), ("p", -0.3), (patch, 0.7), (0.1 * patch + other, 3.0)]
    ):
        for name in model.patches:
            model.unload_patch(name)
        model.load_patch(other, "q")
        model.load_patch(patch, "p")
        chat = model.chat(patch=chosen, strength=strength, max_new_tokens=5)
        chat.send("one")
        chat.save(file)
        messages = [*chat.messages, user("two")]
        wanted = answer(messages, patch=chosen, strength=strength)
        if number % 2:  # the names do not matter
            for name in ("p", "q"):
                model.unload_patch(name)
            model.load_patch(patch, "q")
            model.load_patch(other, "another name")
        assert model.load_chat(file, max_new_tokens=5).send("two").text == wanted, (chosen, strength)


def test_a_loaded_chat_finds_the_patch_that_its_folder_was_exported_with(
    tiny_llama_patched: Path, tmp_path: Path
) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_patched, "cpu")
    chat = model.chat(strength=2.0, max_new_tokens=5)
    chat.send("one")
    chat.save(tmp_path / "chat.json")
    loaded = model.load_chat(tmp_path / "chat.json", max_new_tokens=5)
    assert (loaded.patch, loaded.strength) == (ACTIVE, 2.0)
    assert loaded.send("two").text == chat.send("two").text
    plain = PatchedModel.from_pretrained(tiny_llama_patched, "cpu", patch=None)
    with pytest.raises(PatchTargetError, match="not loaded"):
        plain.load_chat(tmp_path / "chat.json")


def test_a_patch_that_is_not_loaded_is_named(
    model: PatchedModel, patch: Patch, other: Patch, answer: Answers, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    chat = model.chat(patch=patch + 0.5 * other, max_new_tokens=5)
    chat.send("one")
    chat.save(file)
    model.load_patch(patch, "p")
    with pytest.raises(PatchTargetError, match=f"not loaded: {other.identity[:12]}"):
        model.load_chat(file)
    chat = model.load_chat(file, None, max_new_tokens=5)  # the caller may choose another one
    messages = [*chat.messages, user("two")]
    assert chat.send("two").text == answer(messages, patch=None)


def test_a_chat_of_another_base_is_refused(model: PatchedModel, tmp_path: Path) -> None:
    model.chat().save(tmp_path / "chat.json")
    alter(tmp_path / "chat.json", lambda data: data.update(base_digest="0" * 64, base_model="tests/other"))
    with pytest.raises(ChatFormatError, match=r"another base model.*tests/other"):
        model.load_chat(tmp_path / "chat.json")


# -- writing -------------------------------------------------------------------------------------------------


def test_a_save_replaces_a_saved_chat_and_nothing_else(model: PatchedModel, tmp_path: Path) -> None:
    chat = model.chat(max_new_tokens=2)
    file, foreign = tmp_path / "chat.json", tmp_path / "package.json"
    chat.save(file)
    chat.send("one")
    chat.save(file)
    assert len(model.load_chat(file).messages) == 2
    foreign.write_text('{"name": "mine"}')
    with pytest.raises(OutputError, match="another JSON file"):
        chat.save(foreign)
    assert foreign.read_text() == '{"name": "mine"}'
    assert sorted(os.listdir(tmp_path)) == ["chat.json", "package.json"]


def test_a_save_that_fails_leaves_the_old_file(
    model: PatchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model.chat(max_new_tokens=2)
    file = tmp_path / "chat.json"
    chat.save(file)
    before = file.read_bytes()
    chat.send("one")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            chat.save(file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["chat.json"]


def test_a_chat_that_is_too_large_to_be_read_is_not_written(
    model: PatchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model.chat(max_new_tokens=2)
    chat.send("one" * 30)
    monkeypatch.setattr(saved, "_MAX_BYTES", 400)
    with pytest.raises(RequestError, match="too large"):
        chat.save(tmp_path / "chat.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (float("inf"), "arguments.x"),
        (float("nan"), "arguments.x"),
        ("\ud800", "arguments.x"),
        (1 << 50_000, "JSON cannot state"),
        ({1}, "arguments.x"),
    ],
    ids=["infinite", "not a number", "half a pair", "huge", "a set"],
)
def test_a_chat_that_json_cannot_state_is_not_written(
    model: PatchedModel, tmp_path: Path, value: object, named: str
) -> None:
    model.chat(max_new_tokens=2).save(tmp_path / "chat.json")
    before = (tmp_path / "chat.json").read_bytes()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": value}}}
    messages = (user("one"), {"role": "assistant", "content": "", "tool_calls": [call]})
    folder = model.graph.folder
    chat = saved.SavedChat(folder.base_model, folder.base_digest, messages, None, "base", None, 1.0, ())
    with pytest.raises(RequestError, match=named):
        saved.write_chat(tmp_path / "chat.json", chat)
    assert (tmp_path / "chat.json").read_bytes() == before and os.listdir(tmp_path) == ["chat.json"]


def test_a_system_message_that_json_cannot_state_is_not_written(model: PatchedModel, tmp_path: Path) -> None:
    folder = model.graph.folder
    chat = saved.SavedChat(folder.base_model, folder.base_digest, (), "\ud800", "base", None, 1.0, ())
    with pytest.raises(RequestError, match="JSON cannot state"):
        saved.write_chat(tmp_path / "chat.json", chat)
    assert os.listdir(tmp_path) == []


# -- files that are refused ----------------------------------------------------------------------------------


def alter(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data))


def in_patch(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["patch"].update(values)


TERM = {"identity": "ab" * 32, "strength": 1.0}
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda data: data.update(format="chat"), "not a saved chat"),
    "no format": (lambda data: data.pop("format"), "not a saved chat"),
    "version": (lambda data: data.update(version=2), "version is unknown"),
    "version true": (lambda data: data.update(version=True), "version is unknown"),
    "no messages": (lambda data: data.pop("messages"), "'messages' is missing"),
    "an unknown key": (lambda data: data.update(cache=[]), "does not know"),
    "system": (lambda data: data.update(system=5), "system"),
    "digest": (lambda data: data.update(base_digest=None), "base_digest"),
    "messages": (lambda data: data.update(messages={}), "messages"),
    "a message": (lambda data: data["messages"].append("x"), r"messages\[2\]"),
    "a role": (lambda data: data["messages"][1].update(role=None), r"messages\[1\]"),
    "a system message": (lambda data: data["messages"][0].update(role="system"), r"messages\[0\]"),
    "a content": (lambda data: data["messages"][0].update(content=5), r"messages\[0\].content"),
    "patch": (lambda data: data.update(patch=None), "patch"),
    "an unknown key of the patch": (in_patch(file="x"), "does not know"),
    "a missing key of the patch": (lambda data: data["patch"].pop("name"), "'name' is missing"),
    "choice": (in_patch(choice="other"), "patch.choice"),
    "choice list": (in_patch(choice=[]), "patch.choice"),
    "name": (in_patch(name=5), "patch.name"),
    "strength": (in_patch(strength="1"), "patch.strength"),
    "terms": (in_patch(terms={}), "patch.terms"),
    "too many terms": (in_patch(terms=[TERM] * 300), "patch.terms"),
    "terms of the base": (in_patch(choice="base", terms=[TERM]), "patch.terms"),
    "a term": (in_patch(terms=[5]), r"patch.terms\[0\]"),
    "an identity": (in_patch(terms=[{**TERM, "identity": "x"}]), r"patch.terms\[0\]"),
    "a strength of zero": (in_patch(terms=[{**TERM, "strength": 0}]), r"patch.terms\[0\]"),
    "a strength that is true": (in_patch(terms=[TERM, {**TERM, "strength": True}]), r"patch.terms\[1\]"),
    "an unknown key of a term": (in_patch(terms=[{**TERM, "file": "x"}]), r"patch.terms\[0\]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_that_is_not_as_it_was_written_is_refused(model: PatchedModel, tmp_path: Path, case: str) -> None:
    change, problem = CHANGES[case]
    file = tmp_path / "chat.json"
    chat = model.chat(max_new_tokens=2)
    chat.send("one")
    chat.save(file)
    alter(file, change)
    with pytest.raises(ChatFormatError, match=problem):
        model.load_chat(file)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{" * 100_000, "not valid JSON"),
        (b'{"format": "tp-runtime chat", "format": "tp-runtime chat"}', "duplicate key"),
        (b'{"format": "tp-runtime chat", "version": NaN}', "JSON does not have"),
        (b'{"format": "\\ud800"}', "surrogate"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    model: PatchedModel, tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(ChatFormatError, match=problem):
        model.load_chat(tmp_path / "chat.json")


def test_a_path_that_leads_to_no_readable_file_is_refused(
    model: PatchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(saved, "_MAX_BYTES", 400)
    (tmp_path / "large").write_bytes(b" " * 401)
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "fifo", tmp_path / "large", "a\0b", 5, None):
        with pytest.raises(ChatFormatError):
            model.load_chat(path)  # type: ignore[arg-type]


def test_the_settings_of_a_loaded_chat_are_checked_as_those_of_a_new_one(model: PatchedModel, tmp_path: Path) -> None:
    model.chat().save(tmp_path / "chat.json")
    for options in ({"overflow": "x"}, {"temperature": -1}, {"raw": True}):
        with pytest.raises(RequestError):
            model.load_chat(tmp_path / "chat.json", **options)  # type: ignore[arg-type]

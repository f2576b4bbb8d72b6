"""`tp-runtime chat`: conversations, commands, errors and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.cli import Cli, Result
from runtime_tests.committed import private_copy, with_settings
from runtime_tests.patches import patch_for
from tp_runtime.chat import ChatSession
from tp_runtime.cli import chat as chat_module
from tp_runtime.cli.chat import Chat
from tp_runtime.cli.options import Selection
from tp_runtime.errors import ChatFormatError, OutputError, PatchFormatError, PatchTargetError, RequestError
from tp_runtime.model import ACTIVE, PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE, ModelFolder

Talk = Callable[..., Result]


@pytest.fixture(scope="module")
def file(tiny_llama_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch dir") / "my patch.safetensors"
    patch_for(ModelFolder.open(tiny_llama_export), 1, rank=3, scale=0.3).save(path)
    return path


@pytest.fixture(scope="module")
def model(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu")


@pytest.fixture
def talk(cli: Cli, tiny_llama_export: Path) -> Talk:
    """A function that types lines into a chat and returns the result."""

    def typed(*lines: str, args: tuple[str, ...] = (), model: Path = tiny_llama_export) -> Result:
        common = ("--max-new-tokens", "5", "--device", "cpu")
        return cli("chat", model, *common, *args, typed="".join(f"{line}\n" for line in lines))

    return typed


def new_chat(model: PatchedModel, selection: Selection | None = None, tokens: int = 5) -> Chat:
    return Chat(model, selection or Selection(ACTIVE), None, {"max_new_tokens": tokens})


def state(chat: Chat) -> tuple[Any, ...]:
    assert isinstance(chat.session, ChatSession)
    session = chat.session
    return chat.selection, chat.strength, session, session.messages, session.system, session.patch, session.strength


def answers(model: PatchedModel, *queries: tuple[str, Patch | None], system: str | None = None) -> list[str]:
    """Return the answers of a conversation that runs its whole history for each answer, without a cache."""
    messages: list[dict[str, str]] = []
    for query, patch in queries:
        messages.append({"role": "user", "content": query})
        answer = model.generate(messages, patch=patch, system=system, max_new_tokens=5)
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


# -- conversations -------------------------------------------------------------------------------------------


def test_a_chat_remembers_the_conversation(talk: Talk, model: PatchedModel) -> None:
    result = talk("one", "", "two", "//three")
    assert result.code == 0
    assert result.out == "".join(f"{a}\n" for a in answers(model, ("one", None), ("two", None), ("/three", None)))
    assert "/help" in result.err


def test_the_system_message_comes_first(talk: Talk, model: PatchedModel) -> None:
    result = talk("one", args=("--system", "Be brief."))
    assert result.out == answers(model, ("one", None), system="Be brief.")[0] + "\n"


def test_a_switch_runs_the_history_again_with_the_new_patch(talk: Talk, model: PatchedModel, file: Path) -> None:
    patch = Patch.load(file)
    quoted = f'"{file}"'
    result = talk("one", f"/patch {quoted}", "two", "/strength -0.5", "three", "/patch", "four")
    queries = [("one", None), ("two", patch), ("three", -0.5 * patch), ("four", None)]
    assert result.out == "".join(f"{answer}\n" for answer in answers(model, *queries))
    switches = [line for line in result.err.splitlines() if line.startswith("under")]
    assert switches == [
        "under random-1@1; the next answer first runs the conversation again under it",
        "under random-1@-0.5; the next answer first runs the conversation again under it",
        "under no patch; the next answer first runs the conversation again under it",
    ]


def test_a_chat_starts_with_the_patches_of_the_command_line(talk: Talk, model: PatchedModel, file: Path) -> None:
    patch = Patch.load(file)
    result = talk("one", args=("--patch", f"{file}@0.5", "--patch", str(file)))
    assert result.out == answers(model, ("one", 0.5 * patch + patch))[0] + "\n"
    assert "under random-1@0.5 + random-1@1." in result.err


def test_strength_is_relative_to_the_patch_as_it_was_given(talk: Talk, model: PatchedModel, file: Path) -> None:
    patch = Patch.load(file)
    result = talk("/strength 0", "/strength 3", "/strength -1", "/strength 2", "one", args=("--patch", f"{file}@0.5"))
    assert result.out == answers(model, ("one", patch))[0] + "\n"
    assert "under random-1@1\n" in result.err


def test_reset_forgets_the_conversation(talk: Talk, model: PatchedModel) -> None:
    result = talk("one", "/reset", "two")
    assert result.out.splitlines() == answers(model, ("one", None)) + answers(model, ("two", None))


def test_quit_ends_the_chat(talk: Talk) -> None:
    result = talk("/quit", "one")
    assert (result.code, result.out) == (0, "")


def test_a_completion_style_model_gets_each_line_separately(talk: Talk, tiny_gemma_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_gemma_export, "cpu")
    result = talk("one", "two", model=tiny_gemma_export)
    assert result.out == "".join(f"{model.generate(text, max_new_tokens=5)}\n" for text in ("one", "two"))


def test_a_folders_own_patch_can_be_scaled_and_switched_off(
    talk: Talk, tiny_llama_patched: Path, model: PatchedModel
) -> None:
    patch = Patch.load(tiny_llama_patched / DEFAULT_FILE)
    result = talk("one", "/strength 2", "two", "/patch", "three", model=tiny_llama_patched)
    assert result.out.splitlines() == answers(model, ("one", patch), ("two", 2 * patch), ("three", None))
    assert f"under {patch.name}@2;" in result.err


def test_a_repair_belongs_to_the_base_and_cannot_be_scaled(talk: Talk, tmp_path: Path) -> None:
    result = talk("/strength 2", model=private_copy("tiny-llama-repaired", tmp_path))
    assert "there is no patch to scale" in result.err and "no patch" in result.err.splitlines()[0]


# -- the last turn, the system message, and files --------------------------------------------------------------


def test_undo_takes_the_last_message_and_its_answer_back(talk: Talk, model: PatchedModel) -> None:
    result = talk("one", "two", "/undo", "three")
    first, second = answers(model, ("one", None), ("two", None))
    third = answers(model, ("one", None), ("three", None))[1]
    assert result.out == f"{first}\n{second}\n{third}\n"


def test_retry_gives_the_last_answer_again(talk: Talk, model: PatchedModel) -> None:
    result = talk("one", "/retry", args=("--temperature", "1", "--seed", "5"))
    drawn = [model.generate("one", max_new_tokens=5, temperature=1.0, seed=seed) for seed in (5, 6)]
    assert result.out == "".join(f"{answer}\n" for answer in drawn)


def test_the_system_message_can_be_changed_and_removed(talk: Talk, model: PatchedModel) -> None:
    result = talk("one", '/system  Be "loud".', "/reset", "two", "/system", "/reset", "three")
    expected = [("one", "Be brief."), ("two", 'Be "loud".'), ("three", None)]
    assert result.out == "".join(f"{answers(model, (text, None), system=system)[0]}\n" for text, system in expected)


def test_a_saved_conversation_goes_on_after_a_load(talk: Talk, model: PatchedModel, tmp_path: Path) -> None:
    file = tmp_path / "my chat.json"
    talk("one", f'/save "{file}"', args=("--system", "Be brief."))
    result = talk("other", f'/load "{file}"', "two")
    assert result.out.splitlines()[1] == answers(model, ("one", None), ("two", None), system="Be brief.")[1]
    assert "loaded 1 turn and a system message" in result.err
    assert "saved under" not in result.err


def test_a_conversation_that_was_saved_under_another_patch_says_so(
    talk: Talk, model: PatchedModel, file: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "chat.json"
    talk("one", f"/save {saved}", args=("--patch", f"{file}@0.5"))
    result = talk(f"/load {saved}", "two")
    assert "the conversation was saved under random-1@0.5, and goes on under no patch" in result.err
    first = json.loads(saved.read_text())["messages"]
    wanted = model.generate([*first, {"role": "user", "content": "two"}], max_new_tokens=5)
    assert result.out == f"{wanted}\n"
    again = talk(f'/patch "{file}"', "/strength 0.5", f"/load {saved}", "two")
    assert "saved under" not in again.err


def test_drop_oldest_answers_without_the_oldest_turns(talk: Talk, model: PatchedModel) -> None:
    half = model.graph.folder.context_window // 2 + 1  # one token per byte
    result = talk("x" * half, "y" * half, args=("--drop-oldest",))
    assert result.out.splitlines() == [*answers(model, ("x" * half, None)), *answers(model, ("y" * half, None))]
    assert "does not see the oldest turns (1)" in result.err


def test_a_chat_samples_as_the_model_says_unless_the_command_line_says_otherwise(talk: Talk, tmp_path: Path) -> None:
    folder = private_copy("tiny-llama", tmp_path)
    with_settings(folder, "generation_config.json", do_sample=True, temperature=0.7, top_k=20)
    model = PatchedModel.from_pretrained(folder, "cpu")
    options: dict[str, Any] = {"max_new_tokens": 5, "seed": 3}
    own = model.generate("one", sampling="model", **options)
    hot = model.generate("one", sampling="model", temperature=1.5, **options)
    greedy = model.generate("one", **options)
    assert len({own, hot, greedy}) == 3
    seed = ("--seed", "3")
    assert talk("one", model=folder, args=seed).out == f"{own}\n"
    assert talk("one", model=folder, args=(*seed, "--temperature", "1.5")).out == f"{hot}\n"
    assert talk("one", model=folder, args=(*seed, "--sampling", "greedy")).out == f"{greedy}\n"


@pytest.mark.parametrize("line", ["/retry", "/undo", "/save chat.json", "/load chat.json"])
def test_a_completion_style_model_has_no_conversation_to_change(talk: Talk, tiny_gemma_export: Path, line: str) -> None:
    result = talk(line, "/system Once.", "/reset", "one", model=tiny_gemma_export)
    assert "continues each line separately and remembers none" in result.err
    model = PatchedModel.from_pretrained(tiny_gemma_export, "cpu")
    assert result.out == model.generate("one", system="Once.", max_new_tokens=5) + "\n"


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/patch nothing.safetensors", PatchFormatError),
        ("/patch a\0b", PatchFormatError),
        ("/patch ~nobody-of-that-name/p.safetensors", PatchFormatError),
        ("/patch ./none", PatchFormatError),
        ('/patch "a', RequestError),
        ("/bogus", RequestError),
        ("/", RequestError),
        ("/strength", RequestError),
        ("/strength 1 2", RequestError),
        ("/reset now", RequestError),
        ("/retry now", RequestError),
        ("/undo 2", RequestError),
        ("/save", RequestError),
        ("/save a b", RequestError),
        ("/save .", OutputError),
        ("/load", RequestError),
        ("/load nothing.json", ChatFormatError),
        ("/system \ud800", RequestError),
        ("/quit now", RequestError),
        ("/strength 2", PatchTargetError),
    ],
)
def test_a_command_that_fails_changes_nothing(model: PatchedModel, line: str, error: type[Exception]) -> None:
    chat = new_chat(model)
    chat.take("one")
    before = state(chat)
    with pytest.raises(error):
        chat.take(line)
    assert state(chat) == before


@pytest.mark.parametrize("strength", ["nan", "inf", "x", "1e99"])
def test_an_invalid_strength_changes_nothing(talk: Talk, model: PatchedModel, file: Path, strength: str) -> None:
    result = talk("one", f"/strength {strength}", "two", args=("--patch", str(file)))
    patch = Patch.load(file)
    assert result.out.splitlines() == answers(model, ("one", patch), ("two", patch))
    assert "error: strength: the value is not a valid strength" in result.err


def test_a_patch_that_does_not_fit_does_not_replace_the_old_one(
    talk: Talk, model: PatchedModel, file: Path, tiny_gemma_export: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    patch_for(ModelFolder.open(tiny_gemma_export)).save(other)
    result = talk("one", f"/patch {other}", "two", args=("--patch", str(file)))
    patch = Patch.load(file)
    assert result.out.splitlines() == answers(model, ("one", patch), ("two", patch))
    assert "another base model" in result.err


def test_a_file_that_cannot_be_read_does_not_end_the_chat(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> Selection:
        raise PermissionError(13, "Permission denied")

    chat_read = chat_module.read_patches
    monkeypatch.setattr(chat_module, "read_patches", lambda specs: refuse(specs) if specs else chat_read(specs))
    result = talk("/patch secret", "one")
    assert "error: [Errno 13] Permission denied" in result.err
    assert result.out


def test_a_full_context_window_is_reported_and_reset_empties_it(talk: Talk, model: PatchedModel) -> None:
    half = model.graph.folder.context_window // 2 + 1  # one token per byte
    result = talk("x" * half, "y" * half, "/reset", "two")
    assert "leaves no room in the context window" in result.err
    assert "/reset forgets it" in result.err
    assert result.out.splitlines()[-1:] == answers(model, ("two", None))


def test_a_message_that_is_refused_is_not_remembered(model: PatchedModel) -> None:
    chat = new_chat(model)
    chat.take("one")
    before = state(chat)
    for bad in ("x" * 100_000, "\udcff"):
        with pytest.raises(RequestError):
            chat.take(bad)
    assert state(chat) == before


# -- Ctrl-C --------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Simulate Ctrl-C while the chunk with this number, counted from 1, is printed."""
    printed: list[str] = []

    def emit(chunk: str) -> None:
        printed.append(chunk)
        if len(printed) == chunks:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "emit", emit)


def test_ctrl_c_stops_the_answer_and_keeps_the_text_so_far(
    model: PatchedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = "".join(chunks := list(model.stream("one", max_new_tokens=20)))
    assert len(chunks) > 3
    chat = new_chat(model, tokens=20)
    interrupt_after(monkeypatch, 2)
    chat.take("one")
    partial = chat.session.messages[1]["content"]
    assert partial == "".join(chunks[:2])
    assert partial != whole
    assert "stopped" in capsys.readouterr().err
    chat.take("two")  # the chat continues with the partial answer in its history
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": partial},
        {"role": "user", "content": "two"},
    ]
    assert chat.session.messages[3]["content"] == model.generate(messages, max_new_tokens=20)


def test_ctrl_c_before_the_first_word_forgets_the_message(
    model: PatchedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    chat = new_chat(model)
    with monkeypatch.context() as patched:
        patched.setattr(model.graph, "forward", interrupted)
        chat.take("one")
    assert chat.session.messages == []
    assert "the message is forgotten" in capsys.readouterr().err
    chat.take("two")
    assert chat.session.messages[1]["content"] == model.generate("two", max_new_tokens=5)


def test_ctrl_c_during_a_command_changes_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(specs: list[str]) -> Selection:
        if specs:
            raise KeyboardInterrupt
        return Selection(ACTIVE)

    monkeypatch.setattr(chat_module, "read_patches", interrupted)
    result = talk("/patch slow", "one")
    assert result.code == 0
    assert "interrupted; nothing was changed" in result.err
    assert result.out

"""The stop strings of a patch: completions under it end before them, unless the request says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.cli import Cli
from runtime_tests.patches import patch_for
from tp_runtime.cli.chat import Chat
from tp_runtime.cli.options import BASE, Selection
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

PROMPT = "Where is the cat?"
LENGTH: dict[str, Any] = {"max_new_tokens": 12}


def stopping(patch: Patch, *stop: str) -> Patch:
    return replace(patch, config=replace(patch.config, stop=stop))


@pytest.fixture
def whole(model: PatchedModel, patch: Patch) -> str:
    """The completion under the patch without any stop string."""
    text = model.generate(PROMPT, patch=patch, **LENGTH)
    assert len(text) > 6
    return text


@pytest.fixture
def stop(whole: str) -> str:
    return whole[4:6]


def test_generate_ends_before_the_stop_string_of_the_patch(
    model: PatchedModel, patch: Patch, whole: str, stop: str
) -> None:
    wanted = whole[: whole.index(stop)]
    own = stopping(patch, "never there", stop)
    assert model.generate(PROMPT, patch=own, **LENGTH) == wanted
    assert model.generate(PROMPT, patch=own, stop=None, **LENGTH) == wanted
    stream = model.stream(PROMPT, patch=own, **LENGTH)
    assert "".join(stream) == wanted and stream.finish_reason == "stop"


def test_the_stop_strings_of_a_request_win(model: PatchedModel, patch: Patch, whole: str, stop: str) -> None:
    own = stopping(patch, stop)
    assert model.generate(PROMPT, patch=own, stop=[], **LENGTH) == whole
    assert model.generate(PROMPT, patch=own, stop=(), **LENGTH) == whole
    other = whole[7:9]
    assert model.generate(PROMPT, patch=own, stop=[other], **LENGTH) == whole[: whole.index(other)]


def test_a_loaded_an_active_and_a_default_patch_bring_their_stop_strings(
    model: PatchedModel, patch: Patch, whole: str, stop: str
) -> None:
    wanted, own = whole[: whole.index(stop)], stopping(patch, stop)
    model.load_patch(own, "p")
    assert model.generate(PROMPT, patch="p", **LENGTH) == wanted
    with model.patched("p"):
        assert model.generate(PROMPT, **LENGTH) == wanted
        assert stop in model.generate(PROMPT, stop=[], **LENGTH)
        base = model.generate(PROMPT, patch=None, **LENGTH)
    assert model.generate(PROMPT, **LENGTH) == base
    opened = PatchedModel.from_pretrained(model.graph.folder.path, "cpu", patch=own)
    assert opened.generate(PROMPT, **LENGTH).startswith(wanted)
    assert stop not in opened.generate(PROMPT, **LENGTH)


def test_a_patch_of_strength_0_has_no_stop_strings(model: PatchedModel, patch: Patch) -> None:
    base = model.generate(PROMPT, patch=None, **LENGTH)
    assert (0 * stopping(patch, base[3:5])).config.stop == ()
    assert model.generate(PROMPT, patch=stopping(patch, base[3:5]), strength=0, **LENGTH) == base


def test_a_scaled_patch_keeps_its_stop_strings(patch: Patch) -> None:
    assert (0.5 * stopping(patch, "a")).config.stop == (-stopping(patch, "a")).config.stop == ("a",)


@pytest.mark.parametrize(
    ("p", "q", "wanted"),
    [
        ((), (), ()),
        (("a",), (), ("a",)),
        ((), ("b", "c"), ("b", "c")),
        (("a", "b"), ("b", "a"), ("a", "b")),
        (("a",), ("b",), ()),
        (("a",), ("a", "b"), ()),
    ],
)
def test_a_sum_has_the_stop_strings_on_which_its_patches_agree(
    patch: Patch, p: tuple[str, ...], q: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    assert (stopping(patch, *p) + stopping(patch, *q)).config.stop == wanted


def test_each_row_of_a_batch_has_the_stop_strings_of_its_patch(
    model: PatchedModel, patch: Patch, whole: str, stop: str
) -> None:
    wanted, base = whole[: whole.index(stop)], model.generate(PROMPT, patch=None, **LENGTH)
    own = stopping(patch, stop)
    assert model.generate([PROMPT] * 3, patch=[own, patch, None], **LENGTH) == [wanted, whole, base]
    assert model.generate([PROMPT] * 2, patch=own, stop=[], **LENGTH) == [whole, whole]
    with model.batch(rows=2) as batch:
        one, two = batch.add(PROMPT, patch=own, **LENGTH), batch.add(PROMPT, patch=own, stop=[], **LENGTH)
        while batch.step():
            pass
    assert (one.text, one.finish_reason) == (wanted, "stop") and two.text == whole


def test_a_chat_uses_the_stop_strings_of_its_patch(
    model: PatchedModel, patch: Patch, whole: str, stop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(model, Selection(stopping(patch, stop)), None, LENGTH)  # type: ignore[arg-type]
    chat.take(PROMPT)
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"
    assert chat.session.messages[-1]["content"] == whole[: whole.index(stop)]
    Chat(model, BASE, None, LENGTH).take(PROMPT)  # type: ignore[arg-type]
    assert capsys.readouterr().out == model.generate(PROMPT, patch=None, **LENGTH) + "\n"


def test_the_command_uses_the_stop_strings_of_the_file_unless_it_names_others(
    cli: Cli, tmp_path: Path, model: PatchedModel
) -> None:
    folder, file = model.graph.folder, tmp_path / "p.safetensors"
    patch = patch_for(folder, seed=1, scale=0.5).rounded("f32")
    command = ("generate", folder.path, PROMPT, "--raw", "--max-new-tokens", "12", "--patch", file)
    patch.save(file)
    whole = cli(*command, "--json").json["text"]
    stop = whole[4:6]
    stopping(patch, stop).save(file)
    assert cli(*command, "--json").json["text"] == whole[: whole.index(stop)]
    assert cli(*command, "--json", "--no-stop").json["text"] == whole
    other = whole[2:4]
    for options in (("--stop", other), ("--no-stop", "--stop", other), ("--no-stop", "--stop", other)):
        assert cli(*command, "--json", *options).json["text"] == whole[: whole.index(other)]
    shown = cli("inspect", file)
    assert f"stop          {stop!a}\n" in shown.out and cli("inspect", file, "--json").json["stop"] == [stop]

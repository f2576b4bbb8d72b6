"""`tp-runtime absorb`: the file it writes, what it replaces, and that nothing is left of a command that ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests.cli import Cli
from runtime_tests.patches import patch_for
from tp_runtime.patch import Patch, context_digest
from tp_runtime.session import ModelFolder

SYSTEM = "Always talk like a pirate."


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    """A file with the prompt, which a text editor ended with a newline."""
    (tmp_path / "prompt.txt").write_text(SYSTEM + "\r\n")
    return tmp_path / "prompt.txt"


def test_a_prompt_becomes_a_patch_file(cli: Cli, tiny_llama_export: Path, tmp_path: Path, prompt: Path) -> None:
    out = tmp_path / "pirate.safetensors"
    done = cli("absorb", tiny_llama_export, out, "--system-file", prompt, "--device", "cpu")
    assert (done.code, done.out) == (0, f"{out}\n") and "tokens under no patch" in done.err
    patch = Patch.load(out)
    assert (patch.name, patch.dtype, patch.config.context_digest) == ("pirate", "f32", context_digest(SYSTEM))
    answer = cli("generate", tiny_llama_export, "Hi", "--system", SYSTEM, "--max-new-tokens", 8, "--device", "cpu").out
    under = ["--patch", out, "--max-new-tokens", 8, "--device", "cpu"]
    assert cli("generate", tiny_llama_export, "Hi", *under).out == answer
    assert "entries" in cli("inspect", out).out
    # The text itself gives the same patch, and the command replaces a patch file.
    again = cli("absorb", tiny_llama_export, out, "--system", SYSTEM, "--name", "other", "--dtype", "f16")
    assert again.code == 0 and (Patch.load(out).name, Patch.load(out).dtype) == ("other", "f16")


def test_the_patch_holds_the_weights_that_it_was_made_under(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    weights = patch_for(ModelFolder.open(tiny_llama_export), seed=1, scale=0.5)
    weights.save(tmp_path / "w.safetensors")
    out, under = tmp_path / "both.safetensors", f"{tmp_path / 'w.safetensors'}@0.5"
    assert cli("absorb", tiny_llama_export, out, "--system", SYSTEM, "--patch", under).code == 0
    common = ["--max-new-tokens", 8, "--device", "cpu"]
    wanted = cli("generate", tiny_llama_export, "Hi", "--system", SYSTEM, "--patch", under, *common).out
    assert cli("generate", tiny_llama_export, "Hi", "--patch", out, *common).out == wanted
    refused = cli("absorb", tiny_llama_export, tmp_path / "twice.safetensors", "--system", SYSTEM, "--patch", out)
    assert refused.code == 2 and "the active patch has entries" in refused.err
    assert not (tmp_path / "twice.safetensors").exists()


BAD: dict[str, tuple[list[str], str]] = {
    "no .safetensors": (["x.bin", "--system", "a"], "does not end in .safetensors"),
    "no patch": (["notes.safetensors", "--system", "a"], "already exists and is not replaced"),
    "in the model folder": (["model/x.safetensors", "--system", "a"], "lies in a folder that this command reads"),
    "the patch itself": (["w.safetensors", "--system", "a", "--patch", "w.safetensors"], "replace an input"),
    "no text": (["x.safetensors", "--system", " \n"], "the prompt to absorb is empty"),
    "an empty file": (["x.safetensors", "--system-file", "empty.txt"], "the prompt to absorb is empty"),
    "not UTF-8": (["x.safetensors", "--system-file", "latin.txt"], "wanted UTF-8 text"),
    "a folder": (["x.safetensors", "--system-file", "model"], "not a regular file"),
    "no file": (["x.safetensors", "--system-file", "none.txt"], "No such file"),
    "a name": (["x.safetensors", "--system", "a", "--name", "a\x1b"], "config.name"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_export: Path) -> Path:
    """The current folder, with files of the user's and a link to the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_llama_export)
    (tmp_path / "notes.safetensors").write_bytes(b"precious")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    patch_for(ModelFolder.open(tiny_llama_export)).save(tmp_path / "w.safetensors")
    return tmp_path


def test_a_prompt_in_front_of_system_messages(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    out, common = tmp_path / "p.safetensors", ("--max-new-tokens", 8, "--device", "cpu")
    assert cli("absorb", tiny_llama_export, out, "--system", SYSTEM, "--before-system", "--device", "cpu").code == 0
    wanted = cli("generate", tiny_llama_export, "Hi", "--system", f"{SYSTEM}\n\nBe kind.", *common).out
    assert cli("generate", tiny_llama_export, "Hi", "--system", "Be kind.", "--patch", out, *common).out == wanted
    refused = cli("generate", tiny_llama_export, "Hi", "--patch", out, *common)
    assert refused.code == 2 and "the entries stand in front of a system message" in refused.err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(cli: Cli, place: Path, name: str) -> None:
    arguments, message = BAD[name]
    before = {file: file.read_bytes() for file in place.iterdir() if file.is_file()}
    done = cli("absorb", "model", *arguments, "--device", "cpu")
    assert done.code in (1, 2) and message in done.err and done.out == ""
    assert {file: file.read_bytes() for file in place.iterdir() if file.is_file()} == before


def test_one_text_has_to_be_given(cli: Cli, place: Path) -> None:
    for arguments in ([], ["--system", "a", "--system-file", "empty.txt"]):
        with pytest.raises(SystemExit):
            cli("absorb", "model", "x.safetensors", *arguments)


def test_ctrl_c_leaves_no_file(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the prompt runs, and while the file is written."""
    names = sorted(file.name for file in place.iterdir())
    run = ["absorb", "model", "x.safetensors", "--system", SYSTEM, "--device", "cpu"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place_of_the_interrupt in ("tp_runtime.session.Graph.forward", "tp_runtime.storage.atomic._flush"):
        with monkeypatch.context() as patched:
            patched.setattr(place_of_the_interrupt, interrupted)
            assert cli(*run).code == 130
        assert sorted(file.name for file in place.iterdir()) == names


def test_progress_is_shown_on_a_terminal_only(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["absorb", "model", "x.safetensors", "--system", SYSTEM, "--device", "cpu"]
    assert "run the prompt" not in cli(*run).err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "run the prompt: 33 of 33 tokens" in cli(*run).err

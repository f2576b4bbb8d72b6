"""OUT of every command: what it replaces, and that a bad OUT is refused before a model is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tp_export.source
from runtime_tests.patches import patch_for, random_config
from tp_export.cli import main
from tp_export.formats import LORA_FILE, LORA_FOLDER
from tp_export.graph import export_model
from tp_export.report import PAGE
from tp_export.source import open_source
from tp_runtime.errors import OutputError
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import ModelFolder
from tp_runtime.storage import check_output_file, check_output_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a command opens a base model."""

    def opened(_source: Any) -> None:
        pytest.fail("the output is checked before the model is opened")

    monkeypatch.setattr(tp_export.source, "open_source", opened)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a source, a prompt, a patch and files of the user's."""
    (tmp_path / "models" / "source").mkdir(parents=True)
    (tmp_path / "models" / "source" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "models" / "patch_slots.json").write_text('{"format": "tp-slots", "files": {}}')
    (tmp_path / "prompt.txt").write_text("Be brief.")
    (tmp_path / "notes.html").write_text("<p>precious</p>")
    (tmp_path / "notes.safetensors").write_bytes(b"precious")
    delta = Delta(np.ones((80, 1)), np.ones((1, 64)), np.ones(64))
    Patch({(1, "mlp_out"): delta}, random_config()).save(tmp_path / "p.safetensors")
    return tmp_path


BAD: dict[str, str] = {
    "model: SRC": "model models/source models/source --overwrite",
    "model: the parent of SRC": "model models/source models --overwrite",
    "model: in SRC": "model models/source models/source/out",
    "model: a folder of the user's": "model models/source . --overwrite",
    "model: not empty": "model models/source models",
    "model: a file": "model models/source notes.html --overwrite",
    "lora: SRC": "lora p.safetensors models/source --base models/source --overwrite",
    "lora: the folder of the patch": "lora p.safetensors . --base models/source --overwrite",
    "patch: no patch": "patch models/source notes.safetensors --prompt-file prompt.txt",
    "patch: the weights": "patch models/source models/source/model.safetensors --prompt-file prompt.txt",
    "patch: in SRC": "patch models/source models/source/p.safetensors --prompt-file prompt.txt",
    "import: no patch": "import models notes.safetensors --base models/source",
    "report: no page": "report models/source p.safetensors --prompt x --queries prompt.txt -o notes.html",
    "report: an input": "report models/source p.safetensors --prompt x --queries prompt.txt -o prompt.txt",
    "report: a folder": "report models/source p.safetensors --prompt x --queries prompt.txt -o models",
    "questions: the document": "questions models/source prompt.txt prompt.txt",
    "questions: a file": "questions models/source prompt.txt notes.html",
    "questions: a device": "questions models/source prompt.txt /dev/null",
}


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("command", BAD.values(), ids=BAD.keys())
def test_a_bad_output_is_refused_before_a_model_is_opened_and_nothing_is_lost(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    assert main(command.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert contents(place) == before


def test_the_library_refuses_an_output_in_the_source_as_well(tiny_llama: Path, tmp_path: Path) -> None:
    """SRC may be a hub id, whose folder is known only once it is opened."""
    (tmp_path / "source").symlink_to(tiny_llama, target_is_directory=True)
    with pytest.raises(OutputError, match="lies in"):
        export_model(open_source(tmp_path / "source"), tiny_llama / "out")


# -- each kind is replaced by itself, and nothing similar is ---------------------------------------------------


def lora(place: Path, source: Path, *options: str) -> int:
    file = place / "fitted.safetensors"
    if not file.exists():
        opened = open_source(source)
        config = random_config(base_digest=opened.digest, base_model=opened.name, architecture=opened.architecture)
        Patch({(1, "mlp_out"): Delta(np.ones((80, 1)), np.ones((1, 64)), np.ones(64))}, config).save(file, "f32")
    return main(["lora", str(file), str(place / "lora"), "--base", str(source), *options])


@pytest.mark.parametrize("form", [[], ["--gguf"]], ids=["peft", "gguf"])
def test_a_lora_folder_is_replaced_in_either_form(place: Path, tiny_llama: Path, form: list[str]) -> None:
    assert lora(place, tiny_llama, *form) == 0
    assert lora(place, tiny_llama) == 2
    assert lora(place, tiny_llama, "--overwrite") == 0
    assert sorted(os.listdir(place / "lora")) == ["adapter_config.json", "adapter_model.safetensors"]


FOREIGN_LORA: dict[str, Callable[[Path], Any]] = {
    "a model card": lambda folder: (folder / "README.md").write_text("trained for a week"),
    "trained by peft": lambda folder: (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"auto_mapping": None})
    ),
    "one file more": lambda folder: (folder / LORA_FILE).write_bytes(b"GGUF"),
}


@pytest.mark.parametrize("change", FOREIGN_LORA.values(), ids=FOREIGN_LORA.keys())
def test_a_lora_folder_of_another_tool_is_kept(place: Path, tiny_llama: Path, change: Callable[[Path], Any]) -> None:
    assert lora(place, tiny_llama) == 0
    change(place / "lora")
    before = contents(place)
    with pytest.raises(OutputError):
        check_output_folder(place / "lora", LORA_FOLDER)
    assert lora(place, tiny_llama, "--overwrite") == 2
    assert contents(place) == before


def test_a_control_vector_replaces_control_vectors_only(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, command = place / "v.gguf", ["control-vector", str(place / "p.safetensors"), str(place / "v.gguf"), "--lossy"]
    assert main(command) == main(command) == 0
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros(4, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for weights in (file.read_bytes(), b"GGUF", b"text"):
        file.write_bytes(weights)
        assert main(command) == 2
        assert file.read_bytes() == weights
    assert "wanted a new file, or a control vector to replace" in capsys.readouterr().err


def test_a_report_replaces_reports_only(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for title, ours in (("pirate: patch report", True), ("a: patch report on my work", False), ("patch report", False)):
        page.write_text(f"<!DOCTYPE html>\n<title>{title}</title>\n<style>\n</style>: patch report</title>")
        if ours:
            assert check_output_file(page, PAGE) == page
            continue
        with pytest.raises(OutputError, match="another file"):
            check_output_file(page, PAGE)


def test_an_adapter_replaces_adapters_only(tiny_llama_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.onnx_adapter"
    patch_for(ModelFolder.open(tiny_llama_export)).save(tmp_path / "p.safetensors", "f32")
    command = ["adapter", str(tmp_path / "p.safetensors"), str(tiny_llama_export), str(out)]
    assert main(command) == main(command) == 0
    out.write_text("notes that nobody else has")
    assert main(command) == 2
    assert out.read_text() == "notes that nobody else has"

"""A prepared graph is used only with a record, outside the folder, that it was made here, and only unchanged."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.cli import Cli
from runtime_tests.logits import token_ids
from tp_runtime.errors import ModelFormatError, UnsafePathError
from tp_runtime.session import PREPARED, Graph, ModelFolder, check_prepared, prepare, prepared
from tp_runtime.session import model_folder as folder_module
from tp_runtime.session.prepared import prepared_graph
from tp_runtime.session.prepared_record import write_record

IDS = token_ids(12)
NO_RECORD = "no record that it was made on this machine"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("TP_HOME", str(path))
    return path


@pytest.fixture(scope="module")
def original(tiny_llama_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that another machine prepared: its processor and its ONNX Runtime are those of this one."""
    path = shutil.copytree(tiny_llama_export, tmp_path_factory.mktemp("original") / "m")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TP_HOME", str(tmp_path_factory.mktemp("elsewhere")))
        prepare(ModelFolder.open(path))
    yield path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "m")


def record(path: Path) -> None:
    """Record that the folder was prepared here."""
    write_record((path / PREPARED / "prepared.json").read_bytes())


def used(path: Path, verify: bool = False) -> bool:
    return prepared_graph(ModelFolder.open(path, verify)) is not None


# -- folders from elsewhere ------------------------------------------------------------------------------------


def test_a_prepared_graph_that_came_with_the_folder_is_not_used(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tp_runtime"):
        assert not used(path)
    assert [entry.levelname for entry in caplog.records] == ["INFO"]
    assert NO_RECORD in caplog.text and "run `tp-runtime prepare` again" in caplog.text
    record(path)
    assert used(path) and used(path, verify=True)


def test_the_prepared_graph_of_another_model_is_not_run(path: Path, tiny_gemma_export: Path, tmp_path: Path) -> None:
    """Everything that the folder itself can say is right: the digests, the sizes, the machine and the graph."""
    wanted = Graph(ModelFolder.open(path), "cpu")
    other = shutil.copytree(tiny_gemma_export, tmp_path / "other")
    prepare(ModelFolder.open(other))
    manifest = json.loads((other / PREPARED / "prepared.json").read_text())
    manifest["graph_digest"] = ModelFolder.open(path).graph_digest
    shutil.rmtree(path / PREPARED)
    shutil.copytree(other / PREPARED, path / PREPARED)
    (path / PREPARED / "prepared.json").write_text(json.dumps(manifest))
    for verify in (False, True):
        graph = Graph(ModelFolder.open(path, verify), "cpu")
        assert np.array_equal(graph.run(IDS, graph.base), wanted.run(IDS, wanted.base))


def test_an_edited_description_of_the_prepared_graph_loses_its_record(path: Path) -> None:
    record(path)
    file = path / PREPARED / "prepared.json"
    file.write_text(file.read_text() + " ")
    assert not used(path)


def test_a_folder_that_is_moved_or_copied_on_this_machine_keeps_its_prepared_graph(path: Path, tmp_path: Path) -> None:
    record(path)
    assert used(shutil.copytree(path, tmp_path / "copy"))
    assert used(path.rename(tmp_path / "moved"))


def test_a_record_of_another_processor_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Machines may share the user's home directory."""
    record(path)
    monkeypatch.setattr(prepared, "_processor", lambda: "another one")
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        assert not used(path)
    assert "it was made for processor" in caplog.text


# -- prepared files that changed -------------------------------------------------------------------------------


def _alter(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", ["weights", "model.onnx"])
@pytest.mark.parametrize("verify", [False, True])
def test_an_altered_prepared_file_is_not_used(
    path: Path, name: str, verify: bool, caplog: pytest.LogCaptureFixture
) -> None:
    record(path)
    _alter(path / PREPARED / name)
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        assert not used(path, verify)
    assert "SHA-256 differs" in caplog.text
    with pytest.raises(ModelFormatError, match="has changed since it was made") as caught:
        check_prepared(ModelFolder.open(path, verify))
    assert caught.value.field == f"{PREPARED}/{name}" and "tp-runtime prepare" in caught.value.fix


def test_large_prepared_weights_are_hashed_under_verify(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(path)
    monkeypatch.setattr(folder_module, "ALWAYS_HASHED", 100)
    _alter(path / PREPARED / "weights")
    assert used(path) and not used(path, verify=True)


def test_a_prepared_graph_that_names_another_file_is_not_used(path: Path) -> None:
    root = path / PREPARED
    shutil.move(root / "weights", root / "weightz")
    graph = root / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"weights", b"weightz"))
    files = folder_module.describe_files(root, ["model.onnx"])
    manifest = json.loads((root / "prepared.json").read_text())
    manifest["files"] = {name: {"sha256": found.sha256, "bytes": found.bytes} for name, found in files.items()}
    (root / "prepared.json").write_text(json.dumps(manifest))
    record(path)
    assert not used(path, verify=True)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
@pytest.mark.parametrize("name", ["prepared.json", "model.onnx", "weights"])
def test_a_prepared_file_that_is_a_fifo_is_not_opened(path: Path, name: str) -> None:
    record(path)
    (path / PREPARED / name).unlink()
    os.mkfifo(path / PREPARED / name)
    assert not used(path)


def test_a_link_in_place_of_the_prepared_folder_is_neither_used_nor_written_through(path: Path, tmp_path: Path) -> None:
    record(path)
    outside = (path / PREPARED).rename(tmp_path / "outside")
    (path / PREPARED).symlink_to(outside)
    assert not used(path)
    before = sorted(outside.iterdir())
    with pytest.raises(UnsafePathError, match="is a link"):
        prepare(ModelFolder.open(path), again=True)
    assert sorted(outside.iterdir()) == before


# -- the record ------------------------------------------------------------------------------------------------


def _no_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TP_HOME")
    monkeypatch.setattr(Path, "expanduser", refuse)


def _a_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("x")


def _read_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # because a test may run as root, who may write anywhere


@pytest.mark.parametrize("damage", [_no_home, _a_file, _read_only])
def test_without_a_place_for_the_record_nothing_is_prepared(
    path: Path,
    home: Path,
    damage: Callable[[Path, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    damage(home, monkeypatch)
    assert not used(path)
    before = (path / PREPARED / "prepared.json").read_bytes()
    with pytest.raises(OSError):
        prepare(ModelFolder.open(path))
    assert (path / PREPARED / "prepared.json").read_bytes() == before
    assert cli("prepare", path).code == 1
    assert cli("inspect", path).code == 0


def test_a_record_that_cannot_be_written_leaves_the_folder_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_manifest: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "write_record", full)
    shutil.rmtree(path / PREPARED)
    before = sorted(path.iterdir())
    with pytest.raises(OSError):
        prepare(ModelFolder.open(path))
    assert sorted(path.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
@pytest.mark.parametrize("kind", ["a fifo", "empty", "another", "huge", "a folder"])
def test_a_record_that_is_damaged_does_not_count(path: Path, home: Path, kind: str) -> None:
    record(path)
    (file,) = (home / "prepared").iterdir()
    content = file.read_bytes()
    file.unlink()
    if kind == "a fifo":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    else:
        file.write_bytes({"empty": b"", "another": content[:-2] + b" \n", "huge": bytes(2**20)}[kind])
    assert not used(path)


# -- the commands ----------------------------------------------------------------------------------------------


def test_inspect_says_whether_the_prepared_graph_is_used(cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NO_RECORD in cli("inspect", path).out
    report: dict[str, Any] = cli("inspect", path, "--json").json
    assert report["prepared"] and NO_RECORD in report["prepared_not_used"]
    record(path)
    assert cli("inspect", path, "--verify", "--json").json["prepared_not_used"] is None
    _alter(path / PREPARED / "weights")
    assert "has changed since it was made" in cli("inspect", path).out


def test_the_command_prepares_a_folder_that_came_with_a_prepared_graph(cli: Cli, path: Path) -> None:
    assert "prepared: " in cli("prepare", path).err
    assert used(path, verify=True)
    assert "already prepared" in cli("prepare", path).err


def test_a_prepared_graph_counts_for_one_model_only(path: Path) -> None:
    record(path)
    folder = ModelFolder.open(path)
    files = {**folder.files, "model.onnx": replace(folder.files["model.onnx"], sha256="0" * 64)}
    assert prepared_graph(replace(folder, files=files)) is None

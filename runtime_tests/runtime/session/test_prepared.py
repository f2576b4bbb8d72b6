"""Graphs prepared for this machine: they give the same logits, and one that does not fit is not used."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.cli import Cli
from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from tp_runtime.session import PREPARED, Graph, ModelFolder, prepare, prepared
from tp_runtime.session.prepared import prepared_graph
from tp_runtime.session.prepared_record import write_record

IDS = token_ids(20)


@pytest.fixture(scope="module", autouse=True)
def _own_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TP_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def prepared_path(_own_records: None, tiny_llama_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(tiny_llama_export, tmp_path_factory.mktemp("prepared") / "m")
    assert prepare(ModelFolder.open(path))
    return path


@pytest.fixture
def copy(prepared_path: Path, tmp_path: Path) -> ModelFolder:
    return ModelFolder.open(shutil.copytree(prepared_path, tmp_path / "m"))


def test_a_prepared_graph_gives_the_logits_of_the_plain_graph(prepared_path: Path, tiny_llama_export: Path) -> None:
    folder = ModelFolder.open(prepared_path)
    used = prepared_graph(folder)
    assert used is not None and used.folder == folder.path / PREPARED
    packed, plain = Graph(folder, "cpu"), Graph(ModelFolder.open(tiny_llama_export), "cpu")
    patch = patch_for(folder, scale=0.3)
    for bound in (None, patch):
        assert np.abs(packed.run(IDS, packed.bind(bound)) - plain.run(IDS, plain.bind(bound))).max() < 1e-5
    assert packed.base.key == plain.base.key  # caches and patches work with both graphs


def test_a_patch_can_be_set_as_default_in_a_prepared_graph(prepared_path: Path, tiny_llama_export: Path) -> None:
    patch = patch_for(ModelFolder.open(prepared_path), scale=0.3)
    packed, plain = (
        Graph(ModelFolder.open(path), "cpu", defaults=patch) for path in (prepared_path, tiny_llama_export)
    )
    assert np.abs(packed.run(IDS, packed.default) - plain.run(IDS, plain.default)).max() < 1e-5


def test_a_prepared_graph_that_fits_is_not_made_again(copy: ModelFolder) -> None:
    before = (copy.path / PREPARED / "model.onnx").stat().st_mtime_ns
    assert not prepare(copy)
    assert (copy.path / PREPARED / "model.onnx").stat().st_mtime_ns == before
    assert prepare(copy, again=True)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change prepared.json and record the result, as if `prepare` had written it."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "prepared.json").read_text())
        change(manifest)
        _replace(folder, json.dumps(manifest))

    return edit


def _replace(folder: Path, manifest: str) -> None:
    (folder / "prepared.json").write_text(manifest)
    write_record(manifest.encode())


STALE: dict[str, Callable[[Path], Any]] = {
    "another onnxruntime": _manifest(lambda found: found.update(onnxruntime="1.0")),
    "another processor": _manifest(lambda found: found.update(processor="abacus")),
    "another graph": _manifest(lambda found: found.update(graph_digest="0" * 64)),
    "truncated": lambda folder: (folder / "model.onnx").write_bytes(b""),
    "no record": lambda folder: (folder / "prepared.json").unlink(),
    "no JSON": lambda folder: _replace(folder, "{"),
    "a list": lambda folder: _replace(folder, "[]"),
    "a file too many": _manifest(lambda found: found["files"].update({"../model.onnx": found["files"]["weights"]})),
    "the form of an earlier version": _manifest(lambda found: found["files"].update(weights=1)),
    "no files": _manifest(lambda found: found.pop("files")),
    "huge record": lambda folder: _replace(folder, " " * 2**17),
}


@pytest.mark.parametrize("damage", STALE.values(), ids=STALE.keys())
def test_a_prepared_graph_that_does_not_fit_is_reported_and_not_used(
    copy: ModelFolder, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    damage(copy.path / PREPARED)
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        assert prepared_graph(copy) is None
    assert "tp-runtime prepare" in caplog.text
    Graph(copy, "cpu").run(IDS, Graph(copy, "cpu").base)  # the plain graph is used instead
    assert prepare(copy) and prepared_graph(copy) is not None


def test_a_link_out_of_the_folder_is_not_followed(copy: ModelFolder, tmp_path: Path) -> None:
    graph = copy.path / PREPARED / "model.onnx"
    graph.rename(tmp_path / "elsewhere.onnx")
    graph.symlink_to(tmp_path / "elsewhere.onnx")
    assert prepared_graph(copy) is None


def test_an_interruption_keeps_the_earlier_prepared_graph(copy: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "create_session", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(copy, again=True)
    assert prepared_graph(copy) is not None
    assert sorted(entry.name for entry in copy.path.iterdir() if entry.name.startswith(".")) == []


def test_the_command_prepares_a_folder_once(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama_export, tmp_path / "m")
    done = cli("prepare", path)
    assert done.out.strip() == str(path / PREPARED) and "prepared: " in done.err
    assert "already prepared" in cli("prepare", path).err
    assert ModelFolder.open(path).unlisted == ()

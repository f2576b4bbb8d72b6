"""Graphs baked for this machine: the same answers, and no use of one that does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.cli import Cli
from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from tp_runtime.session import PREPARED, Graph, ModelFolder, prepare, prepared
from tp_runtime.session.prepared import prepared_graph

IDS = token_ids(20)


@pytest.fixture(scope="module")
def baked(tiny_llama_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(tiny_llama_export, tmp_path_factory.mktemp("prepared") / "m")
    assert prepare(ModelFolder.open(path))
    return path


@pytest.fixture
def copy(baked: Path, tmp_path: Path) -> ModelFolder:
    return ModelFolder.open(shutil.copytree(baked, tmp_path / "m"))


def test_it_answers_as_the_graph_it_was_made_from(baked: Path, tiny_llama_export: Path) -> None:
    folder = ModelFolder.open(baked)
    assert prepared_graph(folder) == folder.path / PREPARED / "model.onnx"
    here, plain = Graph(folder, "cpu"), Graph(ModelFolder.open(tiny_llama_export), "cpu")
    patch = patch_for(folder, scale=0.3)
    for bound in (None, patch):
        assert np.abs(here.run(IDS, here.bind(bound)) - plain.run(IDS, plain.bind(bound))).max() < 1e-5
    assert here.base.key == plain.base.key  # caches and patches do not care


def test_a_patch_is_baked_in_as_into_the_plain_graph(baked: Path, tiny_llama_export: Path) -> None:
    patch = patch_for(ModelFolder.open(baked), scale=0.3)
    here, plain = (Graph(ModelFolder.open(path), "cpu", defaults=patch) for path in (baked, tiny_llama_export))
    assert np.abs(here.run(IDS, here.default) - plain.run(IDS, plain.default)).max() < 1e-5


def test_what_fits_is_not_made_again(copy: ModelFolder) -> None:
    before = (copy.path / PREPARED / "model.onnx").stat().st_mtime_ns
    assert not prepare(copy)
    assert (copy.path / PREPARED / "model.onnx").stat().st_mtime_ns == before
    assert prepare(copy, again=True)


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "prepared.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return edit


STALE: dict[str, Callable[[Path], Any]] = {
    "another onnxruntime": _record(lambda found: found.update(onnxruntime="1.0")),
    "another processor": _record(lambda found: found.update(processor="abacus")),
    "another graph": _record(lambda found: found.update(graph_digest="0" * 64)),
    "truncated": lambda folder: (folder / "model.onnx").write_bytes(b""),
    "no record": lambda folder: (folder / "prepared.json").unlink(),
    "no JSON": lambda folder: (folder / "prepared.json").write_text("{"),
    "a list": lambda folder: (folder / "prepared.json").write_text("[]"),
    "a file too many": _record(lambda found: found["files"].update({"../model.onnx": 1})),
    "huge record": lambda folder: (folder / "prepared.json").write_text(" " * 2**17),
}


@pytest.mark.parametrize("damage", STALE.values(), ids=STALE.keys())
def test_what_does_not_fit_is_not_used_and_said(
    copy: ModelFolder, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    damage(copy.path / PREPARED)
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        assert prepared_graph(copy) is None
    assert "tp-runtime prepare" in caplog.text
    Graph(copy, "cpu").run(IDS, Graph(copy, "cpu").base)  # the plain graph serves
    assert prepare(copy) and prepared_graph(copy) is not None


def test_a_link_out_of_the_folder_is_not_followed(copy: ModelFolder, tmp_path: Path) -> None:
    graph = copy.path / PREPARED / "model.onnx"
    graph.rename(tmp_path / "elsewhere.onnx")
    graph.symlink_to(tmp_path / "elsewhere.onnx")
    assert prepared_graph(copy) is None


def test_an_interruption_leaves_what_was_there(copy: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "create_session", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(copy, again=True)
    assert prepared_graph(copy) is not None
    assert sorted(entry.name for entry in copy.path.iterdir() if entry.name.startswith(".")) == []


def test_the_command(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama_export, tmp_path / "m")
    done = cli("prepare", path)
    assert done.out.strip() == str(path / PREPARED) and "prepared: " in done.err
    assert "already prepared" in cli("prepare", path).err
    assert ModelFolder.open(path).unlisted == ()

"""The patches of a fleet's folder in one replica: what can be named, and what is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.patches import patch_for
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

pytest.importorskip("ray")
Catalogue = pytest.importorskip("tp_runtime.fleet.catalogue").Catalogue


@pytest.fixture
def model(tmp_path: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(private_copy("tiny-llama", tmp_path), "cpu", threads=1)


@pytest.fixture
def folder(tmp_path: Path, model: PatchedModel) -> Path:
    made = tmp_path / "patches"
    made.mkdir()
    patch_for(model.graph.folder, 1, rank=2).save(made / "one.safetensors")
    return made


@pytest.fixture
def catalogue(model: PatchedModel, folder: Path) -> Any:
    made = Catalogue(model, "tiny", folder)
    made.scan()
    return made


def test_every_file_can_be_named_and_only_what_is_held_is_loaded(catalogue: Any, model: PatchedModel) -> None:
    assert list(catalogue.names()) == ["one"] and not model.patches
    catalogue.hold("one")
    assert list(model.patches) == ["one"]
    catalogue.hold("one")  # let go and taken again, while a request still used it
    catalogue.let_go("one")
    catalogue.scan()
    assert list(model.patches) == ["one"]
    catalogue.let_go("one")
    assert not model.patches


def test_a_patch_that_a_request_uses_is_unloaded_later(catalogue: Any, model: PatchedModel) -> None:
    catalogue.hold("one")
    with model.patched("one"):
        catalogue.let_go("one")
        assert list(model.patches) == ["one"]
    catalogue.scan()
    assert not model.patches


def test_a_held_file_that_goes_and_comes_back_stays_loaded(catalogue: Any, model: PatchedModel, folder: Path) -> None:
    catalogue.hold("one")
    away = folder / "away"
    (folder / "one.safetensors").rename(away)
    catalogue.scan()
    assert not catalogue.names() and list(model.patches) == ["one"]
    away.rename(folder / "one.safetensors")
    catalogue.scan()
    assert list(catalogue.names()) == ["one"] and list(model.patches) == ["one"]


def test_a_folder_that_is_gone_changes_nothing(catalogue: Any, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    catalogue.scan()
    assert list(catalogue.names()) == ["one"]


def test_a_changed_file_replaces_a_held_patch(catalogue: Any, model: PatchedModel, folder: Path) -> None:
    catalogue.hold("one")
    before = model.patches["one"].identity
    other = patch_for(model.graph.folder, 2, rank=2)
    other.save(folder / "one.safetensors")
    catalogue.scan()
    saved = Patch.load(folder / "one.safetensors").identity
    assert model.patches["one"].identity == saved == catalogue.names()["one"].identity != before


def test_a_patch_of_another_base_is_not_listed(catalogue: Any, model: PatchedModel, folder: Path) -> None:
    patch = patch_for(model.graph.folder, 2, rank=2)
    replace(patch, config=replace(patch.config, base_digest="0" * 64)).save(folder / "foreign.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"no patch")
    catalogue.scan()
    assert list(catalogue.names()) == ["one"]

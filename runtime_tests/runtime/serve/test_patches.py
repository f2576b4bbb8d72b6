"""Patches of a server: the watched folder, and what requests may load and unload."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import patch_for
from tp_runtime.errors import RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.serve import ServerSettings, create_app
from tp_runtime.serve.patches import ServedPatches, UnknownModelError
from tp_runtime.serve.watch import PatchFolder, watch

from .conftest import CHAT, ask, client

SAMPLED: Any = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}


@pytest.fixture
def folder(model: PatchedModel, tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "patches"
    made.mkdir()
    yield made
    for name in set(model.patches) - {"pirate", "french"}:
        model.unload_patch(name)


@pytest.fixture
def watched(model: PatchedModel, folder: Path) -> PatchFolder:
    return PatchFolder(ServedPatches(model, "tiny-llama", folder))


def save(model: PatchedModel, path: Path, seed: int) -> None:
    """Write a patch as a careful program does: under another name first."""
    hidden = path.with_name(f".{path.name}.new{path.suffix}")
    patch_for(model.graph.folder, seed, scale=0.5).save(hidden)
    os.replace(hidden, path)


def twice(watched: PatchFolder) -> None:
    watched.scan()
    watched.scan()


def test_new_changed_and_deleted_files_are_followed(model: PatchedModel, folder: Path, watched: PatchFolder) -> None:
    save(model, folder / "one.safetensors", 5)
    watched.scan()
    assert "one" not in model.patches  # it may still be growing
    watched.scan()
    first = model.patches["one"]
    save(model, folder / "one.safetensors", 6)
    twice(watched)
    assert model.patches["one"].identity != first.identity
    (folder / "one.safetensors").unlink()
    watched.scan()
    assert "one" not in model.patches


def test_a_file_is_replaced_while_its_requests_run_under_the_old_one(
    model: PatchedModel, folder: Path, watched: PatchFolder
) -> None:
    save(model, folder / "one.safetensors", 5)
    twice(watched)
    old, new = (model.generate("Hi", patch=patch_for(model.graph.folder, n, scale=0.5), **SAMPLED) for n in (5, 6))
    with model.batch() as batch:
        running = batch.add("Hi", patch="one", **SAMPLED)
        batch.step()
        save(model, folder / "one.safetensors", 6)
        twice(watched)
        while batch.step():
            pass
        assert running.text == old and model.generate("Hi", patch="one", **SAMPLED) == new


def test_a_half_written_file_is_loaded_once_it_is_whole(
    model: PatchedModel, folder: Path, watched: PatchFolder, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "one.safetensors"
    patch_for(model.graph.folder, 5).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    for _ in range(3):
        twice(watched)
    assert "one" not in model.patches and caplog.text.count("was not loaded") == 1
    path.write_bytes(whole)
    twice(watched)
    assert "one" in model.patches
    path.write_bytes(whole[:1000])
    twice(watched)
    assert "one" in model.patches  # the version before stays


def test_a_deleted_file_takes_its_patch_from_new_requests_while_others_run_on(
    model: PatchedModel, folder: Path
) -> None:
    patches = ServedPatches(model, "tiny-llama", folder)
    watched = PatchFolder(patches)
    save(model, folder / "one.safetensors", 5)
    twice(watched)
    with model.batch() as batch:
        running = batch.add("Hi", patch="one", **SAMPLED)
        batch.step()
        (folder / "one.safetensors").unlink()
        watched.scan()
        assert "one" in model.patches and "one" not in patches.names()
        with pytest.raises(UnknownModelError):
            patches.choice("one", None)
        while batch.step():
            pass
        assert running.finish_reason != "error"
    watched.scan()
    assert "one" not in model.patches


def test_a_file_that_comes_back_while_its_patch_leaves_is_loaded(model: PatchedModel, folder: Path) -> None:
    patches = ServedPatches(model, "tiny-llama", folder)
    watched = PatchFolder(patches)
    save(model, folder / "one.safetensors", 5)
    twice(watched)
    with model.batch() as batch:
        batch.add("Hi", patch="one", **SAMPLED)
        (folder / "one.safetensors").unlink()
        watched.scan()
        save(model, folder / "one.safetensors", 6)
        twice(watched)
        assert "one" in patches.names()
    watched.scan()
    assert "one" in patches.names()


def test_a_folder_that_is_gone_for_a_while_unloads_nothing(
    model: PatchedModel, folder: Path, watched: PatchFolder
) -> None:
    save(model, folder / "one.safetensors", 5)
    twice(watched)
    folder.rename(folder.with_name("away"))
    twice(watched)
    assert "one" in model.patches
    folder.with_name("away").rename(folder)
    twice(watched)
    assert "one" in model.patches


def test_a_file_never_takes_the_name_of_a_patch_that_came_in_another_way(
    model: PatchedModel, folder: Path, watched: PatchFolder
) -> None:
    before = model.patches["pirate"]
    save(model, folder / "pirate.safetensors", 5)
    twice(watched)
    assert model.patches["pirate"] is before
    (folder / "pirate.safetensors").unlink()
    twice(watched)
    assert model.patches["pirate"] is before


def test_only_plain_visible_files_within_the_folder_are_loaded(
    model: PatchedModel, folder: Path, watched: PatchFolder
) -> None:
    save(model, folder.parent / "outside.safetensors", 5)
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "data").mkdir()
    save(model, folder / "data" / "real.safetensors", 5)
    (folder / "inside.safetensors").symlink_to(folder / "data" / "real.safetensors")  # as in a mounted ConfigMap
    save(model, folder / ".hidden.safetensors", 5)
    save(model, folder / "a+b.safetensors", 5)
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "fifo.safetensors")
    twice(watched)
    assert set(model.patches) == {"pirate", "french", "inside"}


def test_a_server_has_the_files_of_the_folder_from_its_start(model: PatchedModel, folder: Path) -> None:
    save(model, folder / "one.safetensors", 5)
    cards = ask(model, "GET", "/v1/patches", settings={"patch_dir": folder}).json()["data"]
    assert [card["id"] for card in cards] == ["french", "one", "pirate"]


def test_a_running_server_follows_the_folder(
    model: PatchedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_runtime.serve.watch._SCAN_SECONDS", 0.01)

    async def follow() -> None:
        async with client(model, patch_dir=folder) as made:
            save(model, folder / "one.safetensors", 5)
            while "one" not in model.patches:
                await asyncio.sleep(0.01)
            answer = await made.post("/v1/chat/completions", json={**CHAT, "model": "one"})
            assert answer.status_code == 200

    asyncio.run(follow())


def test_a_scan_that_fails_does_not_end_the_watching(
    model: PatchedModel, watched: PatchFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tp_runtime.serve.watch._SCAN_SECONDS", 0.0)
    scans: list[int] = []

    def broken() -> None:
        scans.append(1)
        raise ValueError("x")

    monkeypatch.setattr(watched, "scan", broken)

    async def run() -> None:
        task = asyncio.create_task(watch(watched))
        while len(scans) < 3:
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    assert "could not be scanned" in caplog.text


def test_requests_load_and_unload_where_that_is_on(model: PatchedModel, folder: Path) -> None:
    save(model, folder / "file.safetensors", 5)
    settings = {"patch_dir": folder, "manage_patches": True}

    async def manage() -> None:
        async with client(model, **settings) as made:
            loaded = await made.post("/v1/patches", json={"name": "mine", "file": "file.safetensors"})
            assert loaded.status_code == 201 and loaded.json()["id"] == "mine"
            assert (await made.post("/v1/chat/completions", json={**CHAT, "model": "mine"})).status_code == 200
            assert (await made.delete("/v1/patches/mine")).status_code == 204
            gone = await made.post("/v1/chat/completions", json={**CHAT, "model": "mine"})
            assert gone.status_code == 404
            assert (await made.delete("/v1/patches/mine")).status_code == 404

    asyncio.run(manage())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x", "file": "../file.safetensors"}, "file"),
        ({"name": "x", "file": "/etc/passwd"}, "file"),
        ({"name": "x", "file": "a\0.safetensors"}, "file"),
        ({"name": "x", "file": "a\\..\\b.safetensors"}, "file"),
        ({"name": "x", "file": "file.txt"}, "file"),
        ({"name": "x", "file": ".file.safetensors"}, "file"),
        ({"name": "x", "file": "none.safetensors"}, "file"),
        ({"name": "x", "file": "link.safetensors"}, "file"),
        ({"name": "x", "file": "n" * 300 + ".safetensors"}, "file"),
        ({"name": "a+b", "file": "file.safetensors"}, "name"),
        ({"name": "tiny-llama", "file": "file.safetensors"}, "name"),
        ({"name": "a\0", "file": "file.safetensors"}, "name"),
        ({"name": "", "file": "file.safetensors"}, "name"),
    ],
)
def test_requests_load_only_plain_names_within_the_folder(
    model: PatchedModel, folder: Path, body: dict[str, str], field: str
) -> None:
    save(model, folder / "file.safetensors", 5)
    save(model, folder.parent / "file.safetensors", 5)
    (folder / "link.safetensors").symlink_to(folder.parent / "file.safetensors")
    response = ask(model, "POST", "/v1/patches", json=body, settings={"patch_dir": folder, "manage_patches": True})
    assert response.status_code == 400 and response.json()["error"]["field"] == field, response.text


def test_a_server_refuses_names_that_requests_cannot_name(model: PatchedModel) -> None:
    with pytest.raises(RequestError, match="a request cannot name a patch like this"):
        create_app(model, ServerSettings(), "pirate")
    with pytest.raises(RequestError, match="the model has no name"):
        create_app(model, ServerSettings(), "a\nb")

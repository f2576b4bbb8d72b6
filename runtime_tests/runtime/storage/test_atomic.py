"""Atomic writes: a file or folder is written completely or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tp_runtime.errors import OutputError
from tp_runtime.storage import ANY_FILE, Kind, atomic_file, atomic_folder

STALE = Kind("a folder with a file `stale`", lambda path: None if (path / "stale").exists() else "another folder")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


INTERRUPTIONS = [KeyboardInterrupt(), ValueError("bug"), disk_full(), SystemExit(1)]


def test_a_file_is_written_and_replaced(tmp_path):
    target = tmp_path / "p.safetensors"
    for text in ("one", "two"):
        with atomic_file(target, ANY_FILE) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".safetensors"
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    assert names(tmp_path) == ["p.safetensors"]


def test_the_mode_of_a_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "f") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
def test_an_interrupted_file_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_file(tmp_path / "f.bin") as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


def test_an_interrupted_file_keeps_the_old_one(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "f", ANY_FILE) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_leaves_no_file(tmp_path, monkeypatch, call):
    def fail(*_):
        raise disk_full()

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("all of it")
    assert names(tmp_path) == []


def test_a_file_in_a_missing_folder_raises_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "no" / "f"):
        pass
    assert names(tmp_path) == []


def test_a_file_with_the_name_of_a_folder_leaves_no_temporary_file(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(OutputError, match="got a folder"), atomic_file(tmp_path / "d", ANY_FILE) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["d"]


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "model.onnx").write_text(text)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_folder_is_written(tmp_path, exists):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    with atomic_folder(target) as temporary:
        fill(temporary, "x")
        assert not exists or names(target) == []
    assert (target / "sub" / "model.onnx").read_text() == "x"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    with (
        pytest.raises(OutputError, match=r"already exists.*got a folder with 1 entries.*wanted.*Fix"),
        atomic_folder(target),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_was_filled_in_the_meantime_is_refused(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="1 entries"), atomic_folder(target) as temporary:
        fill(temporary, "ours")
        target.mkdir()
        fill(target, "theirs")
    assert (target / "sub" / "model.onnx").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("replaces", [None, STALE], ids=["new", "overwrite"])
def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path, replaces):
    (tmp_path / "out").write_text("precious")
    with (
        pytest.raises(OutputError, match="got a file"),
        atomic_folder(tmp_path / "out", replaces),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "precious"


def test_overwrite_replaces_the_old_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_folder(target, STALE) as temporary:
        fill(temporary, "new")
        assert names(target) == ["stale"]
    assert names(target) == ["sub"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path, error, overwrite):
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "stale").write_text("old")
    with pytest.raises(type(error)), atomic_folder(target, STALE if overwrite else None) as temporary:
        fill(temporary, "half")
        raise error
    assert names(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or names(target) == ["stale"]


def test_a_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    rename, calls = os.rename, []

    def second_fails(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise disk_full()
        rename(old, new)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="No space left"), atomic_folder(target, STALE) as temporary:
        fill(temporary, "new")
    assert names(tmp_path) == ["out"] and names(target) == ["stale"]


def test_a_folder_written_through_a_symlink_replaces_its_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    with atomic_folder(tmp_path / "link") as temporary:
        fill(temporary, "x")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["sub"]

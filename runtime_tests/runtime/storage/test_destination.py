"""What may be written where: what is replaced, and what is refused before the work starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tp_runtime.errors import OutputError
from tp_runtime.storage import (
    ANY_FILE,
    Kind,
    atomic_file,
    atomic_folder,
    check_output_file,
    check_output_folder,
    foreign_entries,
    is_temporary_name,
)

OURS = Kind("a folder of ours", lambda path: None if (path / "ours").exists() else "another folder")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "models" / "source"
    folder.mkdir(parents=True)
    (folder / "ours").write_text("weights")
    return folder


def folder_of_ours(path: Path) -> Path:
    path.mkdir()
    (path / "ours").write_text("")
    return path


def test_a_folder_of_the_kind_is_replaced_and_any_other_one_is_refused(tmp_path: Path) -> None:
    ours, theirs = folder_of_ours(tmp_path / "ours"), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("precious")
    assert check_output_folder(ours, OURS) == ours
    for path in (theirs, theirs.parent.parent, Path("/"), Path.home()):
        with pytest.raises(OutputError, match="is not replaced"):
            check_output_folder(path, OURS)


def test_an_output_folder_that_is_or_holds_or_lies_in_an_input_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    (source.parent / "ours").write_text("")
    for path in (source, tmp_path / "link", source / ".." / "source", source.parent):
        with pytest.raises(OutputError, match="would replace an input"):
            check_output_folder(path, OURS, [source])
        with pytest.raises(OutputError, match="would replace an input"):
            check_output_folder(path, OURS, [tmp_path / "link"])
    for path in (source / "out", tmp_path / "link" / "out"):
        with pytest.raises(OutputError, match="lies in"):
            check_output_folder(path, OURS, [source])


def test_a_relative_path_to_the_input_is_recognised(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    for path in (".", "../source/", ".."):
        with pytest.raises(OutputError):
            check_output_folder(path, OURS, [source])
        with pytest.raises(OutputError):
            check_output_folder(source, OURS, ["."])


def test_a_folder_that_holds_what_the_input_links_to_is_refused(source: Path, tmp_path: Path) -> None:
    blobs = folder_of_ours(tmp_path / "blobs")
    (source / "model.safetensors").symlink_to(blobs / "ours")
    with pytest.raises(OutputError, match="would replace an input"):
        check_output_folder(blobs, OURS, [source])


def test_an_input_that_does_not_exist_is_ignored(tmp_path: Path) -> None:
    assert check_output_folder(tmp_path / "out", OURS, ["owner/model"]) == tmp_path / "out"


def test_a_file_that_is_an_input_or_lies_in_one_is_refused(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("x")
    os.link(text, tmp_path / "second name")
    for path in (text, tmp_path / "second name", tmp_path / "." / "text"):
        with pytest.raises(OutputError, match="would replace an input"):
            check_output_file(path, ANY_FILE, [text])
    with pytest.raises(OutputError, match="lies in"):
        check_output_file(source / "page.html", ANY_FILE, [source])


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="POSIX devices")
def test_a_device_a_fifo_and_a_dangling_link_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nothing")
    for path in (Path("/dev/null"), tmp_path / "fifo", tmp_path / "dangling", tmp_path):
        with pytest.raises(OutputError, match="is not replaced"):
            check_output_file(path, ANY_FILE)


def test_a_file_is_replaced_only_if_its_kind_is_known(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mine")
    (tmp_path / "empty").write_text("")
    with pytest.raises(OutputError, match="got a file"):
        check_output_file(tmp_path / "text")
    assert check_output_file(tmp_path / "text", ANY_FILE) == tmp_path / "text"
    assert check_output_file(tmp_path / "empty") == tmp_path / "empty"


def test_a_kind_that_fails_on_the_contents_refuses_them(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mine")
    kind = Kind("a file of ours", lambda path: str(1 / 0))
    with pytest.raises(OutputError, match=r"something else \(ZeroDivisionError: division by zero\)"):
        check_output_file(tmp_path / "text", kind)


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(OutputError, match="a mount point"):
        check_output_folder(tmp_path / "volume")


def test_a_folder_that_cannot_be_written_raises_the_systems_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for check in (check_output_file, check_output_folder):
        with pytest.raises(FileNotFoundError):
            check(tmp_path / "no" / "out")
        with pytest.raises(NotADirectoryError):
            check(tmp_path / "file" / "out")
        with pytest.raises(OutputError, match="NUL"):
            check(str(tmp_path / "a\0b"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError):
        check_output_folder(tmp_path / "out")


def test_a_folder_that_changes_its_kind_during_the_work_is_kept(tmp_path: Path) -> None:
    out = folder_of_ours(tmp_path / "out")
    with pytest.raises(OutputError, match="another folder"), atomic_folder(out, OURS) as folder:
        (folder / "ours").write_text("new")
        (out / "ours").rename(out / "theirs")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["theirs"]


@pytest.mark.parametrize("also_taken", [False, True])
def test_a_folder_that_changes_after_the_last_check_is_never_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also_taken: bool
) -> None:
    """The change comes between the check and the rename, and another program may take the free name as well."""
    out = folder_of_ours(tmp_path / "out")
    rename = os.rename

    def change_first(old: Path, new: Path) -> None:
        if old == out:
            (out / "ours").rename(out / "theirs")
        rename(old, new)
        if old == out and also_taken:
            folder_of_ours(out)

    monkeypatch.setattr(os, "rename", change_first)
    with pytest.raises((OutputError, OSError)), atomic_folder(out, OURS) as folder:
        (folder / "ours").write_text("new")
    held = [path.parent for path in tmp_path.glob("*/theirs")]
    assert len(held) == 1 and sorted(tmp_path.iterdir()) == sorted({out, *held})


def test_a_folder_that_becomes_a_link_during_the_work_is_not_followed(tmp_path: Path) -> None:
    out, theirs = folder_of_ours(tmp_path / "out"), folder_of_ours(tmp_path / "theirs")
    with pytest.raises(OutputError), atomic_folder(out, OURS, [theirs]) as folder:
        (folder / "ours").write_text("new")
        out.rename(tmp_path / "moved")
        out.symlink_to(theirs, target_is_directory=True)
    assert out.is_symlink() and (theirs / "ours").read_text() == ""
    assert sorted(os.listdir(tmp_path)) == ["moved", "out", "theirs"]


def test_two_writers_of_one_folder_leave_one_whole_folder(tmp_path: Path) -> None:
    out = folder_of_ours(tmp_path / "out")
    with atomic_folder(out, OURS) as first, atomic_folder(out, OURS) as second:
        (first / "ours").write_text("first")
        (second / "ours").write_text("second")
    assert os.listdir(tmp_path) == ["out"] and (out / "ours").read_text() == "first"
    with (
        pytest.raises(OutputError),
        atomic_folder(tmp_path / "new") as first,
        atomic_folder(tmp_path / "new") as second,
    ):
        (first / "ours").write_text("first")
        (second / "ours").write_text("second")
    assert sorted(os.listdir(tmp_path)) == ["new", "out"] and (tmp_path / "new" / "ours").read_text() == "second"


def test_the_longest_name_of_the_system_can_be_written(tmp_path: Path) -> None:
    file, folder = tmp_path / ("f" * 243 + ".safetensors"), tmp_path / ("ö" * 127)
    with atomic_file(file) as temporary:
        assert temporary.suffix == ".safetensors" and is_temporary_name(temporary.name, file.name)
    with atomic_folder(folder) as temporary:
        assert is_temporary_name(temporary.name, folder.name) and not is_temporary_name(temporary.name, "model")
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_the_entries_of_a_folder_that_are_not_ours_are_named(tmp_path: Path) -> None:
    for name in ("config.json", "z", "a", "b\n", "c"):
        (tmp_path / name).write_text("")
    (tmp_path / "prepared").mkdir()
    assert foreign_entries(tmp_path, ["config.json", "z", "a", "b\n", "c"], ["prepared"]) is None
    found = foreign_entries(tmp_path, ["config.json", "prepared"])
    assert found == r"a folder that also holds 'a', 'b\n', 'c', 'prepared' and 1 more"

"""Regular files: read whole, and everything else is refused at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import (
    UnreadableFileError,
    open_regular,
    read_json_object,
    read_regular,
    sha256_file,
    user_folder,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


def test_a_file_and_a_link_to_it_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text\r\n\0")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "a", 7) == read_regular(tmp_path / "b", 7) == b"text\r\n\0"
    (tmp_path / "empty").touch()
    assert read_regular(tmp_path / "empty", 0) == b""


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 2**40)  # the file is sparse, so it needs no disk space
    with pytest.raises(UnreadableFileError, match="too large"):
        read_regular(tmp_path / "huge", 2**20)


@posix
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket", "NUL", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("fifo")
    Path("folder").mkdir()
    Path("link to a fifo").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        path = {"device": "/dev/zero", "NUL": "a\0b"}.get(kind, kind)
        with pytest.raises(UnreadableFileError):
            read_regular(path, 2**20)
        if kind not in ("NUL", "device"):
            with pytest.raises(UnreadableFileError):
                sha256_file(Path(path))
            with pytest.raises(ModelFormatError, match="not a regular file") as caught:
                read_json_object(Path(path), ModelFormatError, "copy it")
            assert caught.value.fix == "copy it"


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_regular(tmp_path / "nothing"):
        pass


@posix
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a").write_bytes(b"x")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        read_regular(tmp_path / "a", 1)
        with pytest.raises(UnreadableFileError):
            read_regular(tmp_path / "fifo", 1)
        with pytest.raises(UnreadableFileError):
            read_regular(tmp_path, 1)
    assert len(os.listdir("/dev/fd")) == before


def test_the_users_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_HOME", str(tmp_path))
    assert user_folder("a", "b") == tmp_path / "a" / "b"
    monkeypatch.setenv("TP_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_folder("a") == tmp_path / ".cache" / "tp-runtime" / "a"

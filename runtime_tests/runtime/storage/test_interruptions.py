"""An interruption at any line of an atomic write leaves nothing behind, in contextlib's and shutil's lines as well."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tp_runtime.storage import ANY_FILE, Kind, atomic, atomic_file, atomic_folder, destination, temporary_folder

WATCHED = {atomic.__file__, destination.__file__, contextlib.__file__, shutil.__file__}
VERSION = Kind("a folder with a version", lambda path: None if (path / "version").exists() else "another folder")


class Fault(Exception):
    """An ordinary failure of the block, after which the cleaning up is interrupted."""


def _write_folder(root: Path, fail: bool) -> None:
    with atomic_folder(root / "out", VERSION) as folder:
        (folder / "sub").mkdir()
        (folder / "version").write_text("new")
        if fail:
            raise Fault


def _write_file(root: Path, fail: bool) -> None:
    with atomic_file(root / "out", ANY_FILE) as file:
        file.write_text("new")
        if fail:
            raise Fault


def _use_scratch(root: Path, fail: bool) -> None:
    with temporary_folder(root) as folder:
        (folder / "scratch").write_text("x")
        if fail:
            raise Fault


def _interrupted(number: int, work: Callable[[], None]) -> bool:
    """Run `work` and raise KeyboardInterrupt at the watched event of this number; return whether there was one."""
    count = 0

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in WATCHED:
            return None
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except (KeyboardInterrupt, Fault, OSError):  # OSError: an interrupted shutil.rmtree may close a file twice
        pass
    finally:
        sys.settrace(before)
    return count >= number


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fail", [False, True], ids=["success", "failure"])
@pytest.mark.parametrize("write", [_write_folder, _write_file, _use_scratch], ids=["folder", "file", "scratch"])
def test_an_interruption_at_any_line_leaves_the_old_or_the_new_result(
    tmp_path: Path, write: Callable[[Path, bool], None], fail: bool
) -> None:
    number, seen, interrupted = 0, set(), True
    while interrupted:
        number += 1
        root = tmp_path / str(number)
        root.mkdir()
        if write is _write_folder:
            (root / "out").mkdir()
        result = root / "out" / "version" if write is _write_folder else root / "out"
        result.write_text("old")
        interrupted = _interrupted(number, lambda root=root: write(root, fail))  # type: ignore[misc]
        assert os.listdir(root) == ["out"], number
        seen.add(result.read_text())
        shutil.rmtree(root)
    assert number > 50
    assert seen == ({"old", "new"} if write is not _use_scratch and not fail else {"old"})

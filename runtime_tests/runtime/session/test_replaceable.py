"""The folders that may be replaced: exports and prepared graphs that hold nothing else, whatever happened to them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.folders import alter, fill
from tp_runtime.errors import ModelFormatError, OutputError
from tp_runtime.session import MODEL_FOLDER, PREPARED, ModelFolder, prepare, prepared
from tp_runtime.session.prepared import prepared_graph
from tp_runtime.storage import check_output_folder

HARMLESS: dict[str, Callable[[Path], Any]] = {
    "as exported": lambda path: None,
    "prepared": lambda path: [(path / PREPARED).mkdir(), (path / PREPARED / "weights").write_bytes(b"x")],
    "killed prepare": lambda path: [
        (path / ".prepared.0123456789ab").mkdir(),
        (path / ".prepared.0123456789ab" / "weights").write_bytes(b"x"),
    ],
    "a lost file": lambda path: (path / "config.json").unlink(),
    "a changed file": lambda path: (path / "config.json").write_text("changed"),
    "a later version": lambda path: alter(path, lambda data: data.update(version=99)),
}
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda path: (path / "patch_slots.json").unlink(), "without patch_slots.json"),
    "no JSON": (lambda path: (path / "patch_slots.json").write_text("{"), "something else"),
    "no files": (lambda path: alter(path, lambda data: data.pop("files")), "something else"),
    "another format": (lambda path: alter(path, lambda data: data.update(format="theirs")), "another format"),
    "a user's file": (lambda path: (path / "notes.txt").write_text("precious"), "also holds 'notes.txt'"),
    "a user's folder": (lambda path: (path / "sub").mkdir(), "also holds 'sub'"),
    "a folder with a listed name": (
        lambda path: [(path / "config.json").unlink(), (path / "config.json").mkdir()],
        "also holds 'config.json'",
    ),
    "a user's file in prepared": (
        lambda path: [(path / PREPARED).mkdir(), (path / PREPARED / "notes.txt").write_text("precious")],
        "prepared: a folder that also holds 'notes.txt'",
    ),
    "a file called prepared": (lambda path: (path / PREPARED).write_text("precious"), "something else"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_an_export_may_be_replaced(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    path = fill(tmp_path / "model")
    change(path)
    assert check_output_folder(path, MODEL_FOLDER) == path


@pytest.mark.parametrize(("change", "got"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_folder_that_is_no_export_or_holds_more_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], got: str
) -> None:
    path = fill(tmp_path / "model")
    change(path)
    with pytest.raises(OutputError, match=got):
        check_output_folder(path, MODEL_FOLDER)


@pytest.fixture
def copy(tiny_llama_export: Path, tmp_path: Path) -> ModelFolder:
    folder = ModelFolder.open(shutil.copytree(tiny_llama_export, tmp_path / "m"))
    assert prepare(folder)
    return folder


def test_a_users_file_in_the_prepared_folder_is_not_deleted(copy: ModelFolder) -> None:
    (copy.path / PREPARED / "notes.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        prepare(copy, again=True)
    assert (copy.path / PREPARED / "notes.txt").read_text() == "precious"


def test_a_full_disk_while_preparing_raises_the_systems_error(
    copy: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise ModelFormatError("ONNX Runtime cannot load this graph", fix="export again")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepared, "create_session", fail)
    with pytest.raises(ModelFormatError, match="cannot load this graph"):
        prepare(copy, again=True)  # on a disk with space, the graph is at fault
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare(copy, again=True)
    monkeypatch.undo()
    assert prepared_graph(copy) is not None
    assert [name for name in os.listdir(copy.path) if name.startswith(".")] == []


LIMITED = """
import resource, sys
from tp_runtime.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.exit(main(["prepare", sys.argv[1], "--again"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("limit", [0, 10_000, 200_000])
def test_onnxruntimes_failure_to_write_is_the_systems_error_on_the_command_line(copy: ModelFolder, limit: int) -> None:
    """The limit on a file's size stops ONNX Runtime's own write, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(copy.path), str(limit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and "File too large" in done.stderr and "export" not in done.stderr
    assert prepared_graph(copy) is not None
    assert [name for name in os.listdir(copy.path) if name.startswith(".")] == []

"""Signals that end a command: they leave no temporary files, also if a second one interrupts the cleaning up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# A command that writes a folder and waits in the middle of it. `SECOND` names a signal that it sends to itself once it
# cleans up, and `KEEP` makes a library of its own swallow the first exception.
PROGRAM = """
import os, select, shutil, signal, sys
from pathlib import Path
from tp_runtime.cli import run_program
from tp_runtime.storage import atomic_file, atomic_folder, temporary_folder

remove = shutil.rmtree
def interrupted(*args, **options):
    shutil.rmtree = remove
    if name := os.environ.get("SECOND"):
        os.kill(os.getpid(), getattr(signal, name))
    remove(*args, **options)
shutil.rmtree = interrupted

def wait():
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.05)[0]:  # a read that begins just after a signal would not notice it
        pass
    sys.stdin.read()

class Command:
    def add_parser(self, subparsers):
        subparsers.add_parser("write").set_defaults(run=self.run)

    def run(self, args):
        with atomic_folder("out") as folder, atomic_file("file") as file, temporary_folder(".") as scratch:
            for path in (folder / "model.onnx", file, scratch / "x"):
                path.write_text("half")
            try:
                wait()
            except BaseException:
                if "KEEP" not in os.environ:
                    raise
                wait()
        return 0

sys.exit(run_program("test", "", [Command()], ["write"]))
"""
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def _start(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    def defaults() -> None:  # a test run in the background ignores SIGINT, and a child inherits that
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_DFL)

    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        **{"stdin": pipe, "stdout": pipe, "stderr": pipe},
        cwd=folder,
        env={**os.environ, **environment},
        preexec_fn=defaults,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


def _end(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Wait for the end without closing stdin, which would let the command finish."""
    assert process.stdout and process.stderr and process.stdin
    process.stdout.read()
    errors = process.stderr.read()
    code = process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()
    return code, errors


@pytest.mark.parametrize("second", ["", *SIGNALS])
@pytest.mark.parametrize("first", SIGNALS)
def test_a_signal_leaves_nothing_behind_even_if_another_interrupts_the_cleaning_up(
    tmp_path: Path, first: str, second: str
) -> None:
    process = _start(tmp_path, SECOND=second)
    process.send_signal(getattr(signal, first))
    code, errors = _end(process)
    assert os.listdir(tmp_path) == []
    assert code in (CODES[first], CODES.get(second))
    assert b"Traceback" not in errors


def test_a_signal_that_a_library_swallows_does_not_make_the_command_deaf(tmp_path: Path) -> None:
    process = _start(tmp_path, KEEP="1")
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 143
    assert os.listdir(tmp_path) == []


def test_a_command_that_no_signal_ends_writes_all(tmp_path: Path) -> None:
    process = _start(tmp_path)
    assert process.communicate(b"")[1] == b"" and process.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]

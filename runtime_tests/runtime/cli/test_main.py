"""The `tp-runtime` command: exit codes, stdout and stderr, signals, and terminals."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime_tests.cli import Cli
from runtime_tests.patches import random_config, random_patch
from tp_runtime.cli import generate, main
from tp_runtime.cli.printing import emit, print_fields, size

COMMAND = [sys.executable, "-c", "import sys; from tp_runtime.cli import main; sys.exit(main())"]


@pytest.mark.parametrize("args", [[], ["bogus"], ["generate"], ["inspect"], ["generate", "x", "hi", "--top-k", "many"]])
def test_a_wrong_command_line_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert "usage: tp-runtime" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "bench"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert command in capsys.readouterr().out


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("tp-runtime ")


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_system_errors_and_interruptions_are_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str
) -> None:
    def fail(_: object) -> int:
        raise raised

    monkeypatch.setattr(generate, "run", fail)
    monkeypatch.setattr("tp_runtime.cli.program._drop_stdout", lambda: None)
    result = cli("generate", "x", "hi")
    assert (result.code, result.out, result.err) == (code, "", message)


def test_an_interruption_that_a_library_turns_into_an_error_is_an_interruption(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(generate, "run", fail)
    result = cli("generate", "x", "hi")
    assert (result.code, result.err) == (130, "interrupted\n")


def test_an_unexpected_error_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli("generate", "x", "hi")


def test_a_command_restores_loggers_and_stdout(cli: Cli, tmp_path: Path) -> None:
    before, errors = list(logging.getLogger("tp_runtime").handlers), sys.stdout.errors
    assert cli("inspect", tmp_path).code == 2
    assert logging.getLogger("tp_runtime").handlers == before
    assert sys.stdout.errors == errors


def test_an_error_cannot_steer_the_terminal(cli: Cli, tmp_path: Path) -> None:
    result = cli("inspect", tmp_path / "\x1b[2Jnothing")
    assert result.code == 2
    assert "\x1b" not in result.err


def test_a_closed_pipe_prints_no_error(tiny_llama_export: Path) -> None:
    run = [*COMMAND, "inspect", str(tiny_llama_export)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_reported_in_one_line(tiny_llama_export: Path) -> None:
    with open("/dev/full", "wb") as full:
        run = [*COMMAND, "inspect", str(tiny_llama_export), "--json"]
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"error: [Errno 28] No space left on device\n"


def test_a_character_that_stdout_cannot_encode_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    random_patch(config=random_config(name="café")).save(file)
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run([*COMMAND, "inspect", str(file)], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"caf\xe9" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_a_chat_that_waits_on_a_pipe(tiny_llama_export: Path) -> None:
    run = [*COMMAND, "chat", str(tiny_llama_export), "--device", "cpu"]
    pipe = subprocess.PIPE

    def restore_sigint() -> None:
        # A test run started in the background ignores SIGINT, and a child inherits that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(run, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=restore_sigint) as process:
        assert process.stderr
        assert b"/help" in process.stderr.readline()  # the chat now waits for a line
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"interrupted\n"
    assert process.returncode == 130


# -- printing ------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_generated_text_cannot_steer_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", terminal := _Terminal())
    emit("a\x1b[31m\tb\nc\r\x9b")
    assert terminal.getvalue() == "a\\x1b[31m\tb\nc\\x0d\\x9b"


def test_generated_text_is_written_to_a_file_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", file := io.StringIO())
    emit("a\x1b[31m")
    assert file.getvalue() == "a\x1b[31m"


def test_printed_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields([("a", "1\n2"), ("long", "\x1b")])
    assert capsys.readouterr().out == "a     1\n      2\nlong  \\x1b\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB (1000 bytes)"),
        (999_999, "1.0 MB (999999 bytes)"),
        (538_129_152, "538.1 MB (538129152 bytes)"),
    ],
)
def test_sizes_are_printed_with_a_unit_and_in_bytes(count: int, text: str) -> None:
    assert size(count) == text

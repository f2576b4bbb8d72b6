"""The command `tp-runtime`: one small file for each subcommand, results on stdout, the rest on stderr."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import TPError
from . import bench, chat, generate, inspect, prepare
from .printing import note, printable, version

# A command is a module with add_parser(subparsers), which sets `run` as a default; run(args) returns the exit
# code. None of them imports onnxruntime or opens a model before run(): `--help` stays instant.
_COMMANDS = (generate, chat, inspect, prepare, bench)
_CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: the arguments, without the program's name; those of the process when None.

    Returns:
        The exit code: 0 done, 2 bad input, 1 the system refused (disk, permission), 130 interrupted, 141 the reader
        of stdout went away.
    """
    parser = argparse.ArgumentParser(
        prog="tp-runtime", description="Run a language model and switch thought patches on and off (edge side)."
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    with _log_on_stderr(), _escaping_stdout():
        try:
            code = int(args.run(args))
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
            return code
        except TPError as error:
            return _fail(str(error), 2)
        except KeyboardInterrupt:
            note("interrupted")
            return 130
        except BrokenPipeError:
            _drop_stdout()
            return _CLOSED_PIPE
        except OSError as error:
            _drop_stdout()
            return _fail(str(error), 1)


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: reading a package's metadata takes longer than `--help`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, help="print the version and exit", **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("tp-runtime", version("tp-runtime"))
        parser.exit()


def _fail(message: str, code: int) -> int:
    note(f"error: {printable(message)}")
    return code


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """The runtime's log, one line a message; nothing is left behind in a process that calls `main`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(_lower_level)
    logger = logging.getLogger("tp_runtime")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _lower_level(record: logging.LogRecord) -> bool:
    record.levelname = record.levelname.lower()
    return True


@contextmanager
def _escaping_stdout() -> Iterator[None]:
    """On a terminal that lacks a character, print its code; the default is a traceback in the middle of a text."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is None:
        yield
        return
    before = sys.stdout.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):  # it flushes
            reconfigure(errors=before)


def _drop_stdout() -> None:
    """Let what stdout still holds go nowhere: Python would try to write it once more, and complain, on exit."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)

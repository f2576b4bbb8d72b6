"""The common part of this project's command lines: exit codes, errors, logs, pipes and signals.

`tp-runtime` and `tp-export` both use it. A subcommand is a module with `add_parser(subparsers)`, which sets a function
`run(args) -> exit code` as the parser's default.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any, NoReturn, Protocol

from ..errors import TPError, is_library_panic, library_text, printable
from .printing import note, version
from .signals import Signalled, ending_on_signals, raise_interruption

_INTERRUPTED = 130  # the exit code that a shell reports for a program that SIGINT ended
_CLOSED_PIPE = 141  # the same for SIGPIPE
_TRACEBACK = "TP_TRACEBACK"  # the environment variable that asks for the traceback of a library's exception
_OWN_MODULES = ("tp_runtime", "tp_export")


class Command(Protocol):
    """A subcommand: a module that adds its parser, whose default `run` runs the subcommand."""

    def add_parser(self, subparsers: Any) -> None:
        """Add the subcommand to the parser."""


def run_program(
    name: str,
    description: str,
    commands: Sequence[Command],
    argv: Sequence[str] | None,
    extras: Mapping[str, str] | None = None,
) -> int:
    """Parse a command line and run one subcommand.

    Args:
        name: the program's name.
        description: what the program does, for its help.
        commands: the subcommands, in the order in which the help lists them.
        argv: the arguments without the program's name; None takes those of the process.
        extras: for each top-level module the extra of this project that installs it. If a missing module is not listed
            here, this is a defect, and its traceback is printed.

    Returns:
        The exit code: 0 on success, 2 for bad input, 1 if the system refused (disk, permission, memory, missing
        package) or a library failed, 130 after Ctrl-C, 141 if the reader of stdout closed it, and 128 + n after
        signal n.

    Raises:
        Exception: an exception that no library raised is a defect of this project, so it keeps its traceback. So does
            every exception if the environment variable TP_TRACEBACK is set.
    """
    parser = _Parser(prog=name, description=description)
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        command.add_parser(subparsers)
    with _log_on_stderr(), _escaping_stdout(), ending_on_signals() as hold_signals:
        try:
            try:
                args = parser.parse_args(argv)
                code = int(args.run(args))
                if sys.stdout is not None:
                    sys.stdout.flush()  # flush here, because a full disk or a closed pipe can still be reported
                return code
            except BaseException as error:
                hold_signals(error)  # nothing interrupts what follows
                raise_interruption(error)
                raise
        except SystemExit:
            if sys.stdout is not None:
                sys.stdout.flush()  # `--help` and `--version` print and exit
            raise
        except TPError as error:
            return _fail(str(error), 2)
        except KeyboardInterrupt:
            note("interrupted")
            return _INTERRUPTED
        except Signalled as ended:
            return 128 + ended.number
        except BrokenPipeError:
            _drop_stdout()
            return _CLOSED_PIPE
        except OSError as error:
            _drop_stdout()
            return _fail(str(error), 1)
        except ModuleNotFoundError as error:
            extra = (extras or {}).get(_top(error.name or ""))
            if extra is None:
                raise
            return _fail(f"{error.name} is not installed; run: pip install 'tp-runtime[{extra}]'", 1)
        except MemoryError as error:
            return _fail(f"there is not enough memory: {library_text(error)}", 1)
        except BaseException as error:
            library = None if os.environ.get(_TRACEBACK) else _library_of(error)
            if library is None:
                raise
            return _fail(f"{library} failed: {library_text(error)}. Fix: set {_TRACEBACK}=1 to see where", 1)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line without control characters: arguments may come from a file or another program."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _Version(argparse.Action):
    """Prints the version. It looks the version up only on request, because this takes longer than `--help`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, help="print the version and exit", **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(parser.prog, version("tp-runtime"))
        parser.exit()


def _library_of(error: BaseException) -> str | None:
    """Return the name of the library that raised an exception; None if it comes from this project's own code.

    The exception's class and the innermost calls are looked at first. Python's own library counts as part of the code
    that called it, and so does generated code, such as a template, which is in no module.
    """
    if is_library_panic(error):
        return "a library written in Rust"
    if not isinstance(error, Exception):
        return None
    calls = [str(frame.f_globals.get("__name__", "")) for frame, _line in traceback.walk_tb(error.__traceback__)]
    modules = (_top(module) for module in (type(error).__module__, *reversed(calls)))
    first = next((top for top in modules if top.isidentifier() and top not in sys.stdlib_module_names), None)
    installed = first in metadata.packages_distributions() and first not in _OWN_MODULES
    return first if installed else None


def _top(module: str) -> str:
    """Return the first part of a module's name."""
    return module.partition(".")[0]


def _fail(message: str, code: int) -> int:
    """Print an error. Further lines, such as pip's output, are indented, so that none looks like another error."""
    note("error: " + "\n  ".join(map(printable, message.split("\n"))))
    return code


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Print the log of tp_runtime, one line for each message. A process that calls `main` keeps its own handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    handler.addFilter(_lower_level)
    logger = logging.getLogger("tp_runtime")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _OneLine(logging.Formatter):
    """Writes a message on one line, without characters that a terminal acts on: it may quote a file or a library."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _lower_level(record: logging.LogRecord) -> bool:
    record.levelname = record.levelname.lower()
    return True


@contextmanager
def _escaping_stdout() -> Iterator[None]:
    """Print escape codes for characters that stdout's encoding lacks. Python would otherwise raise within the text."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is None:
        yield
        return
    before = sys.stdout.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):  # reconfigure flushes stdout, which can fail
            reconfigure(errors=before)


def _drop_stdout() -> None:
    """Discard the buffered output of stdout. Python would otherwise try to write it on exit and print an error."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)

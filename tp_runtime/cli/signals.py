"""What the signals that ask a command to end do: they unwind the stack, so that temporary files are removed.

Ctrl-C (SIGINT) already raises KeyboardInterrupt, and here SIGTERM and SIGHUP raise `Signalled` in the same way. A
further signal raises again, because a library may swallow an exception. Once the command line has caught an exception,
nothing interrupts the cleaning up any more.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Signalled(BaseException):
    """Unwinds the stack when the system asks the program to end.

    Args:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number


def raise_interruption(error: BaseException) -> None:
    """Raise the KeyboardInterrupt or `Signalled` that an exception is or was raised from, if there is one.

    Libraries turn interruptions into errors of their own: a native module that is interrupted while it is imported
    raises ImportError. The command was interrupted all the same.
    """
    found = _interruption_in(error)
    if found is not None:
        try:
            raise found from None
        finally:
            del error, found  # this frame must not keep alive what the exception's frames hold


def _interruption_in(error: BaseException) -> BaseException | None:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, (KeyboardInterrupt, Signalled)):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def ending_on_signals() -> Iterator[Callable[[BaseException], None]]:
    """Raise on SIGTERM and SIGHUP within the block, unless the process ignores or already handles them.

    Yields:
        A function that takes a caught exception and holds all signals off from its call to the end of the block. If the
        exception is an interruption, by then everything is freed that its frames kept alive, temporary files included.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda _error: None  # only the main thread may set handlers, and only there do they raise
        return
    before: dict[int, Any] = {}
    interrupted = False

    def hold(error: BaseException) -> None:
        nonlocal interrupted
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        interrupted = _interruption_in(error) is not None

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.getsignal(number)
    try:
        for number in before.keys() - {signal.SIGINT}:
            signal.signal(number, _end)
        yield hold
    finally:
        if interrupted:
            gc.collect()  # frames that form cycles are freed only now
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> None:
    raise Signalled(number)

"""Ctrl-C at every line: a trace function that raises KeyboardInterrupt at one line of a call, for each line in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class _Interrupter:
    """A trace function that raises KeyboardInterrupt at the step with a given number, and counts until then.

    Args:
        files: ends of the names of the files whose lines count.
        number: the number of the step, from 0.
        opcodes: whether every bytecode instruction is a step, and not only every line.
    """

    def __init__(self, files: tuple[str, ...], number: int, opcodes: bool) -> None:
        self._files, self._left, self._opcodes = files, number, opcodes
        self.at: str | None = None

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if self.at is not None or not frame.f_code.co_filename.endswith(self._files):
            return None
        if self._opcodes:
            frame.f_trace_opcodes = True
        if event in ("call", "opcode" if self._opcodes else "line"):
            if self._left == 0:
                self.at = f"{frame.f_code.co_filename}:{frame.f_lineno} ({event})"
                raise KeyboardInterrupt
            self._left -= 1
        return self


def interrupted_at_every_step(
    action: Callable[[], object], files: tuple[str, ...], *, opcodes: bool = False
) -> Iterator[str]:
    """Call `action` again and again, each time interrupted at a later step, until a call is not interrupted.

    Args:
        action: the function to call.
        files: ends of the names of the files whose lines are interrupted.
        opcodes: whether to interrupt at every bytecode instruction, and not only at every line.

    Yields:
        The place of the interrupt, after each interrupted call, when its exception is gone.
    """
    number, outer = 0, sys.gettrace()
    while True:
        interrupter = _Interrupter(files, number, opcodes)
        try:
            sys.settrace(interrupter)
            action()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(outer)
        if interrupter.at is None:
            assert number > 0  # nothing was interrupted, so the names of the files are wrong
            return
        yield interrupter.at
        number += 1

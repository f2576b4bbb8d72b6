"""Failures at every point of a call: at each line, at each bytecode, or at each call of a compiled function.

A test counts the points that a call passes, and repeats the call once for each point, with an error raised there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import onnxruntime

import tp_runtime

_RUNTIME = str(Path(tp_runtime.__file__).parent)
_ORT = str(Path(onnxruntime.__file__).parent)


class Failure:
    """Raises an error at one point of a call.

    Args:
        kind: `lines` are the lines of tp_runtime, `opcodes` the bytecodes of these lines, and `calls` the beginnings
            and ends of the calls that tp_runtime and ONNX Runtime make to compiled functions: those of numpy, of ONNX
            Runtime, and Python's own.
        at: the number of the point, from 0; -1 raises nothing and only counts.
        error: the error to raise there.

    Attributes:
        passed: the number of points that were passed.
    """

    def __init__(self, kind: str, at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.passed = 0
        self._kind, self._at, self._error = kind, at, error

    def run(self, call: Callable[[], Any]) -> Any:
        """Call `call` and return what it returns."""
        if self._kind == "calls":
            before: Any = sys.getprofile()
            sys.setprofile(self._on_call)
            try:
                return call()
            finally:
                sys.setprofile(before)
        before = sys.gettrace()
        sys.settrace(self._on_frame)
        try:
            return call()
        finally:
            sys.settrace(before)

    def _on_frame(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_RUNTIME):
            return None
        if self._kind == "opcodes":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_line

    def _on_line(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event in ("line", "opcode"):
            self._pass()
        return self._on_line

    def _on_call(self, frame: FrameType, event: str, _arg: Any) -> None:
        if event in ("c_call", "c_return") and frame.f_code.co_filename.startswith((_RUNTIME, _ORT)):
            self._pass()

    def _pass(self) -> None:
        self.passed += 1
        if self.passed == self._at + 1:
            raise self._error("injected")


def run_and_repeat(
    actions: Iterable[Callable[[], None]],
    disturbed: int,
    failure: Failure | None,
    caught: tuple[type[BaseException], ...] = (MemoryError, KeyboardInterrupt),
) -> None:
    """Run actions one after the other. The one with the number `disturbed` runs under `failure`.

    If it raises one of `caught`, it is repeated at once, while its exception and the frames of it are still alive.
    """
    for number, action in enumerate(actions):
        if number == disturbed and failure is not None:
            try:
                failure.run(action)
            except caught:
                action()
        else:
            action()

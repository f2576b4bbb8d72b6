"""Runs a function on a stack of known size: llguidance recurses from part to part, and an overflow ends the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

# Threads have 8 MB on Linux, 512 kB on macOS and 128 kB with musl. Pages that are not touched take no memory.
_STACK_BYTES = 64 * 2**20

_starting = threading.Lock()  # the size is a setting of the whole process


def on_deep_stack(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns, or raise what it raises. It runs on a thread of its own, and this one waits."""
    from concurrent.futures import Future  # most requests have no grammar, and the import delays the first token

    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:  # whatever it is, it belongs to the caller
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="tp-runtime grammar", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return outcome.result()

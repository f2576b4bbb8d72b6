"""Threads of sessions: a pool for each, or one for all sessions of the process.

A session starts as many threads as there are cores, and after a run they wait actively for the next: quickest for one
session that has the cores to itself. Many sessions, or a busy machine, take the cores from each other that way. Then
either the threads sleep (`spin=False`), or all sessions share one pool (`share_threads`), which still waits actively.
"""

from __future__ import annotations

import threading
from typing import Any

from ..errors import RequestError
from .device import require_onnxruntime

_lock = threading.Lock()
_shared: int | None = None  # threads of the pool that all sessions share, None while each has its own
_any_session = False  # whether one was made here


def share_threads(count: int) -> None:
    """Let all sessions of this process run on one pool of threads. To be called before the first model is opened.

    ONNX Runtime then refuses pools of a session's own, those of other libraries in the process too: such sessions need
    `SessionOptions.use_per_session_threads = False`.

    Args:
        count: threads of the pool, the one that runs a session included.

    Raises:
        RequestError: not a number of threads, another number than is shared already, or a model was opened before.
        DeviceUnavailableError: ONNX Runtime is missing.
    """
    global _shared
    _check(count)
    with _lock:
        if _shared == count:
            return
        if _shared is not None or _any_session:
            raise RequestError(
                "threads are shared from the first model on, and in one way",
                field="share_threads",
                got=count,
                wanted=f"{_shared}, as shared already" if _shared is not None else "a call before any model is opened",
                fix="call share_threads once, when the program starts",
            )
        require_onnxruntime().set_global_thread_pool_sizes(count, 1)
        _shared = count


def set_threads(options: Any, threads: int | None, spin: bool) -> None:
    """Set up the threads of a session that is about to be made.

    Args:
        options: its SessionOptions.
        threads: threads of one operator; None takes the shared pool, or without one as many as there are cores.
        spin: whether they wait actively.

    Raises:
        RequestError: not a number of threads, no truth value, or either of them set beside a shared pool.
    """
    global _any_session
    if threads is not None:
        _check(threads)
    if not isinstance(spin, bool):
        raise RequestError("not a truth value", field="spin", got=repr(spin), wanted="True or False")
    with _lock:
        if _shared is not None:
            if threads is not None or not spin:
                raise RequestError(
                    "all sessions share one pool of threads",
                    field="spin" if threads is None else "threads",
                    got=spin if threads is None else threads,
                    wanted=True if threads is None else "None",
                    fix=f"leave it out: share_threads({_shared}) holds for every model of the process",
                )
            options.use_per_session_threads = False
        elif threads is not None:
            options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _any_session = True


def _check(threads: Any) -> None:
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise RequestError("not a number of threads", field="threads", got=repr(threads), wanted="a whole number >= 1")

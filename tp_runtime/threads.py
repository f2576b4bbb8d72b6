"""Threads of sessions: a pool for each, or one for all sessions of the process.

A session starts as many threads as there are cores, and they wait for its next run actively for a while: with many
sessions in one process they take the cores from each other. `share_threads` gives them one pool.
"""

from __future__ import annotations

import threading
from typing import Any

from .device import require_onnxruntime
from .errors import RequestError

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


def set_threads(options: Any, threads: int | None) -> None:
    """Set up the threads of a session that is about to be made.

    Args:
        options: its SessionOptions.
        threads: threads of one operator; None takes the shared pool, or without one as many as there are cores.

    Raises:
        RequestError: not a number of threads, or one beside a shared pool.
    """
    global _any_session
    if threads is not None:
        _check(threads)
    with _lock:
        if _shared is not None:
            if threads is not None:
                raise RequestError(
                    "all sessions share one pool of threads",
                    field="threads",
                    got=threads,
                    wanted="None",
                    fix=f"leave it out: share_threads({_shared}) holds for every model of the process",
                )
            options.use_per_session_threads = False
        elif threads is not None:
            options.intra_op_num_threads = threads
        _any_session = True


def _check(threads: Any) -> None:
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise RequestError("not a number of threads", field="threads", got=repr(threads), wanted="a whole number >= 1")

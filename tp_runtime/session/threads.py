"""The threads of sessions: each session has its own pool, or all sessions of the process share one pool.

A session starts as many threads as there are cores. After a run they wait actively for the next run, which is fastest
for one session that has the cores to itself. If there are many sessions, or the machine is busy, actively waiting
threads take the cores from each other. There are two remedies: the threads sleep (`spin=False`), or all sessions share
one pool (`share_threads`), whose threads still wait actively.
"""

from __future__ import annotations

import threading
from typing import Any

from ..errors import RequestError, require_positive
from .device import require_onnxruntime

_MOST_THREADS = 1024  # ONNX Runtime starts any number of threads, until the system kills the process
_lock = threading.Lock()
_shared: int | None = None  # the number of threads in the shared pool; None while each session has its own pool
_any_session = False  # whether this process has created a session


def share_threads(count: int) -> None:
    """Make all sessions of this process share one pool of threads. Call this before the first model is opened.

    ONNX Runtime then refuses sessions with a pool of their own, including sessions of other libraries in the process.
    Those need `SessionOptions.use_per_session_threads = False`.

    Args:
        count: the number of threads in the pool, including the thread that runs a session.

    Raises:
        RequestError: `count` is not a positive integer or too large, a pool of another size is already shared, or a
            model was opened before.
        DeviceUnavailableError: ONNX Runtime is missing.
    """
    global _shared
    require_positive("threads", count, _MOST_THREADS)
    with _lock:
        if _shared == count:
            return
        if _shared is not None or _any_session:
            raise RequestError(
                "the shared pool can be set up only once, and only before the first model is opened",
                field="share_threads",
                got=count,
                wanted=f"{_shared}, the size that was set"
                if _shared is not None
                else "a call before any model is opened",
                fix="call share_threads once, when the program starts",
            )
        require_onnxruntime().set_global_thread_pool_sizes(count, 1)
        _shared = count


def set_threads(options: Any, threads: int | None, spin: bool) -> None:
    """Set up the threads of a session before it is created.

    Args:
        options: the session's SessionOptions.
        threads: the number of threads of one operator. None means the shared pool if there is one, and otherwise one
            thread for each core.
        spin: whether idle threads wait actively.

    Raises:
        RequestError: `threads` is not a positive integer or too large, or `threads` is not None or `spin` is False
            although all sessions share a pool.
    """
    global _any_session
    if threads is not None:
        require_positive("threads", threads, _MOST_THREADS)
    with _lock:
        if _shared is not None:
            if threads is not None or not spin:
                raise RequestError(
                    "this setting is not allowed while all sessions share one pool of threads",
                    field="spin" if threads is None else "threads",
                    got=spin if threads is None else threads,
                    wanted=True if threads is None else "None",
                    fix=f"leave it out: share_threads({_shared}) applies to every model of the process",
                )
            options.use_per_session_threads = False
        elif threads is not None:
            options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _any_session = True

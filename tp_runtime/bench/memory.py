"""The memory of this process: what the system reports of it, and giving back what is free."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path


def give_back_free_memory() -> None:
    """Return freed memory to the system, so that the next reading of the memory does not count it.

    What is allocated next would otherwise fill it, and its growth would not show. This works with glibc and does
    nothing elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_bytes(field: str) -> int | None:
    """Return the bytes that /proc/self/status reports for this process, or None if the system does not report them.

    Args:
        field: the name of the field. `VmRSS` is the resident memory, `RssAnon` the part of it that no file backs, and
            `VmHWM` the peak of the resident memory.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])

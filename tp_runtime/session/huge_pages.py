"""This module puts a session's weights on huge pages.

A decode step reads every weight once. On pages of 4 kB most of these reads first miss the table in which the processor
keeps the addresses of pages (the TLB). On pages of 2 MB few reads miss it. Linux gives such pages to a program that
asks for them, and ONNX Runtime does not ask. So this module finds the memory that the process gained while a session
was created and asks the kernel to put it on huge pages. The contents of the memory do not change.

The request is only advice. On another system, with an old kernel, or with an administrator's setting `never`,
everything stays as it was. It changes no result, so this module gives the advice in the background, after the first
run. That takes 0.3 s for 100 MB if a virtual machine has to ask its host for each huge page.

The logits of a large vocabulary lie on a huge page too: they are read after every step, to find the largest.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

log = logging.getLogger("tp_runtime")

Range = tuple[int, int]  # the first address, and the address after the last

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_PROCESS = Path("/proc/self")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)$")
_RESIDENT = re.compile(r"^Rss: +(\d+) kB$")
_HUGE = 14  # MADV_HUGEPAGE: the kernel may use huge pages here, immediately or in the background
_COLLAPSE = 25  # MADV_COLLAPSE, from Linux 6.1: the kernel uses huge pages immediately


def mapped() -> list[Range]:
    """Return the address ranges that this process has mapped; empty if the system does not report them."""
    return mappings(_read(_PROCESS / "maps"))


def use_huge_pages_soon(taken: Sequence[Range]) -> threading.Thread:
    """Run `use_huge_pages` in a daemon thread, which does not keep the process from ending; return the thread."""
    thread = threading.Thread(target=use_huge_pages, args=(taken,), name="huge pages", daemon=True)
    thread.start()
    return thread


def use_huge_pages(taken: Sequence[Range]) -> int:
    """Put private, written memory of this process on huge pages.

    Args:
        taken: the address ranges to search: those that `mapped` reports now and did not report before the session was
            created. They include memory that other threads allocated in the meantime.

    Returns:
        The number of bytes for which huge pages were requested; 0 if the system has no huge pages.
    """
    size = page_size()
    if size is None:
        return 0
    start, requested = time.perf_counter(), 0
    for first, end in aligned(within(written(_read(_PROCESS / "smaps")), taken), size):
        _advise(first, end - first, _HUGE)
        _advise(first, end - first, _COLLAPSE)
        requested += end - first
    log.debug("requested huge pages for %.0f MB in %.2f s", requested / 1e6, time.perf_counter() - start)
    return requested


def empty_on_huge_pages(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array of arbitrary contents; on huge pages, if the system has them and it fills half of one or more."""
    wanted, size = math.prod(shape) * np.dtype(dtype).itemsize, page_size()
    if size is None or 2 * wanted < size:
        return np.empty(shape, dtype)
    length = -(-wanted // size) * size
    memory = np.frombuffer(mmap.mmap(-1, length + size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    first = -memory.ctypes.data % size
    _advise(memory.ctypes.data + first, length, _HUGE)  # the array holds the memory, which is untouched so far
    return memory[first : first + wanted].view(dtype).reshape(shape)


def page_size() -> int | None:
    """Return the size of a huge page in bytes; None if the system has no huge pages or they are switched off."""
    if "[never]" in _read(_SETTINGS / "enabled"):
        return None
    size = _read(_SETTINGS / "hpage_pmd_size").strip()
    return int(size) if size.isdigit() and _madvise() is not None else None


def mappings(maps: str) -> list[Range]:
    """Return all address ranges in the text of /proc/PID/maps."""
    found = (_MAPPING.match(line) for line in maps.splitlines())
    return [(int(match[1], 16), int(match[2], 16)) for match in found if match]


def written(smaps: str) -> list[Range]:
    """Return the private, writable ranges in the text of /proc/PID/smaps of which at least one half is resident.

    A range of which less is resident is a thread's stack or reserved memory. Huge pages would fill it up.
    """
    found: list[Range] = []
    candidate: Range | None = None
    for line in smaps.splitlines():
        if match := _MAPPING.match(line):
            private = match[3] == "rw-p" and match[4] in ("", "[heap]")
            candidate = (int(match[1], 16), int(match[2], 16)) if private else None
        elif candidate and (match := _RESIDENT.match(line)):
            if 2 * 1024 * int(match[1]) >= candidate[1] - candidate[0]:
                found.append(candidate)
            candidate = None
    return found


def without(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """Return the parts of `ranges` that lie outside all of `others`."""
    merged: list[list[int]] = []  # the others in ascending order, with overlapping and adjacent ranges joined
    for first, end in sorted(others):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    starts, outside = [first for first, _end in merged], []
    for first, end in ranges:
        for other_first, other_end in merged[max(0, bisect_right(starts, first) - 1) :]:
            if other_first >= end:
                break
            if first < other_first:
                outside.append((first, other_first))
            first = max(first, other_end)
        if first < end:
            outside.append((first, end))
    return outside


def within(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """Return the parts of `ranges` that lie in at least one of `others`."""
    return without(ranges, without(ranges, others))


def aligned(ranges: Sequence[Range], size: int) -> list[Range]:
    """Return for each range the part that consists of whole pages of `size` bytes, if there is one."""
    pages = [(-(-first // size) * size, end // size * size) for first, end in ranges]
    return [(first, end) for first, end in pages if first < end]


def _advise(address: int, length: int, advice: int) -> None:
    """Call madvise; its result is ignored, because memory stays as it was if the kernel refuses the advice."""
    madvise = _madvise()
    assert madvise is not None
    madvise(address, length, advice)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # there is no C library to load, as on Windows
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function  # type: ignore[no-any-return]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

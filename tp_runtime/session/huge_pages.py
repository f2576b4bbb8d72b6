"""Weights on huge pages.

A token reads every weight once. On pages of 4 kB most of these reads first miss the table in which the processor keeps
the addresses of pages (the TLB); on pages of 2 MB few do. Linux gives such pages to whom asks, and ONNX Runtime does
not ask. So the memory that was taken while a session was made is named afterwards; what it holds stays as it is.

Only advice: another system, an old kernel or an administrator's `never` leave everything as it was. And since it
changes nothing that a program can see, it is given in the background, after the first run: where a virtual machine has
to ask its host for each huge page, it takes 0.3 s for 100 MB.
"""

from __future__ import annotations

import ctypes
import logging
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger("tp_runtime")

Range = tuple[int, int]  # first address, and the one behind the last

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_PROCESS = Path("/proc/self")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)$")
_RESIDENT = re.compile(r"^Rss: +(\d+) kB$")
_HUGE = 14  # MADV_HUGEPAGE: the kernel may use huge pages here, at once or in the background
_COLLAPSE = 25  # MADV_COLLAPSE, from Linux 6.1: at once


def mapped() -> list[Range]:
    """The address ranges that this process has; none where the system does not tell."""
    return mappings(_read(_PROCESS / "maps"))


def use_huge_pages_soon(taken: Sequence[Range]) -> threading.Thread:
    """`use_huge_pages` in a thread of its own, which keeps no process from ending."""
    thread = threading.Thread(target=use_huge_pages, args=(taken,), name="huge pages", daemon=True)
    thread.start()
    return thread


def use_huge_pages(taken: Sequence[Range]) -> int:
    """Put memory of this process on huge pages, as far as it is its own and written.

    Args:
        taken: where to look: what `mapped` has gained. Memory that other threads took in the same time is among it.

    Returns:
        Bytes that huge pages were asked for; 0 where there are none.
    """
    size = page_size()
    if size is None:
        return 0
    start, asked = time.perf_counter(), 0
    for first, end in aligned(within(written(_read(_PROCESS / "smaps")), taken), size):
        _advise(first, end - first, _HUGE)
        _advise(first, end - first, _COLLAPSE)
        asked += end - first
    log.debug("asked for huge pages for %.0f MB in %.2f s", asked / 1e6, time.perf_counter() - start)
    return asked


def page_size() -> int | None:
    """Bytes of a huge page; None where there are none, or they are switched off."""
    if "[never]" in _read(_SETTINGS / "enabled"):
        return None
    size = _read(_SETTINGS / "hpage_pmd_size").strip()
    return int(size) if size.isdigit() and _madvise() is not None else None


def mappings(maps: str) -> list[Range]:
    """All address ranges of /proc/PID/maps."""
    found = (_MAPPING.match(line) for line in maps.splitlines())
    return [(int(match[1], 16), int(match[2], 16)) for match in found if match]


def written(smaps: str) -> list[Range]:
    """The ranges of /proc/PID/smaps that are the process's own, and in memory for at least one half.

    What is not is a thread's stack, or reserved: huge pages would fill it up.
    """
    found: list[Range] = []
    candidate: Range | None = None
    for line in smaps.splitlines():
        if match := _MAPPING.match(line):
            own = match[3] == "rw-p" and match[4] in ("", "[heap]")
            candidate = (int(match[1], 16), int(match[2], 16)) if own else None
        elif candidate and (match := _RESIDENT.match(line)):
            if 2 * 1024 * int(match[1]) >= candidate[1] - candidate[0]:
                found.append(candidate)
            candidate = None
    return found


def without(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """What of `ranges` lies in none of `others`."""
    apart: list[list[int]] = []  # the others in order, those that touch as one
    for first, end in sorted(others):
        if apart and first <= apart[-1][1]:
            apart[-1][1] = max(apart[-1][1], end)
        else:
            apart.append([first, end])
    starts, left = [first for first, _end in apart], []
    for first, end in ranges:
        for cut, until in apart[max(0, bisect_right(starts, first) - 1) :]:
            if cut >= end:
                break
            if first < cut:
                left.append((first, cut))
            first = max(first, until)
        if first < end:
            left.append((first, end))
    return left


def within(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """What of `ranges` lies in some of `others`."""
    return without(ranges, without(ranges, others))


def aligned(ranges: Sequence[Range], size: int) -> list[Range]:
    """The whole pages of `size` bytes within each range."""
    pages = [(-(-first // size) * size, end // size * size) for first, end in ranges]
    return [(first, end) for first, end in pages if first < end]


def _advise(address: int, length: int, advice: int) -> None:
    """What the kernel refuses stays as it was, so its answer does not matter."""
    madvise = _madvise()
    assert madvise is not None
    madvise(address, length, advice)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # no C library to be found, as on Windows
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function  # type: ignore[no-any-return]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

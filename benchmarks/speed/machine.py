"""Describes the machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


def describe() -> dict[str, Any]:
    """Return processor, memory and system, without the parts that the system does not report."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            found["processor"] = value
        if name in ("flags", "Features"):
            found["flags"] = [flag for flag in _FLAGS if flag in value.split()]
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in sorted(caches.glob("index*")):
        if (index / "level").read_text().strip() == "3":
            found["l3"] = (index / "size").read_text().strip()
    return found

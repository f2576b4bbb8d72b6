"""Measures how fast this machine reads memory: the denominator of the roofline, in the same rounds as the runtimes.

A buffer far larger than any cache is read once from end to end. Each thread reads its own part through BLAS's dot
product of the part with itself, which is one stream of loads, two operations per value, and no writes.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # set before numpy is imported: this module starts its own threads

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.protocol import Worker, serve

_BYTES = 1 << 30
_PASSES = 3


class Bandwidth(Worker):
    """A worker without a model. Its only command is `stream`."""

    packages = ("numpy",)

    def load(self, path: Path, threads: int) -> None:
        """Fill a buffer with ones, so that memory backs every page."""
        self.parts = np.array_split(np.ones(_BYTES // 4, np.float32), threads)
        self.threads = ThreadPoolExecutor(threads)

    def do_stream(self) -> dict[str, Any]:
        """Return the bytes per second of the fastest of a few passes, because something disturbed the slower ones."""
        best = float("inf")
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(self.threads.map(lambda part: np.dot(part, part), self.parts))
            best = min(best, time.perf_counter() - start)
        return {"bytes_per_second": _BYTES / best}

    def reset(self) -> None:
        """Do nothing, because there is no cache."""

    def step(self, ids: Sequence[int]) -> int:
        """Raise an error, because there is no model."""
        raise NotImplementedError


if __name__ == "__main__":
    serve(Bandwidth())

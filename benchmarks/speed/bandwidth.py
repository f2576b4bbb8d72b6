"""How fast this machine reads memory: the denominator of the roofline, measured in the same rounds as the runtimes.

A buffer far larger than any cache is read once from end to end, each thread its own part, by BLAS's dot product of the
part with itself: one stream of loads, two operations a value, nothing written.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy: the threads are ours

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
    """Not a model: `stream` is all it does."""

    packages = ("numpy",)

    def load(self, path: Path, threads: int) -> None:
        """A buffer of ones, so that every page is real."""
        self.parts = np.array_split(np.ones(_BYTES // 4, np.float32), threads)
        self.threads = ThreadPoolExecutor(threads)

    def do_stream(self) -> dict[str, Any]:
        """Bytes per second, the best of a few passes: anything slower was disturbed."""
        best = float("inf")
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(self.threads.map(lambda part: np.dot(part, part), self.parts))
            best = min(best, time.perf_counter() - start)
        return {"bytes_per_second": _BYTES / best}

    def reset(self) -> None:
        """Nothing to forget."""

    def step(self, ids: Sequence[int]) -> int:
        """No model."""
        raise NotImplementedError


if __name__ == "__main__":
    serve(Bandwidth())

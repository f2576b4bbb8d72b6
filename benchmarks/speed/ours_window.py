"""Runs tp-runtime with window caches: layers with a sliding window drop what no later id attends to."""

from __future__ import annotations

from benchmarks.speed.ours import Ours
from benchmarks.speed.protocol import serve


class OursWindow(Ours):
    """tp-runtime, opened with `window_cache=True`."""

    window_cache = True


if __name__ == "__main__":
    serve(OursWindow())

"""Runs tp-runtime on CUDA, with captured decode steps."""

from __future__ import annotations

from benchmarks.speed.ours_cuda import OursCuda
from benchmarks.speed.protocol import serve


class OursCaptured(OursCuda):
    """tp-runtime, opened with `cuda_graphs=True`."""

    cuda_graphs = True


if __name__ == "__main__":
    serve(OursCaptured())

"""Runs onnxruntime-genai on CUDA, with captured decode steps."""

from __future__ import annotations

from benchmarks.speed.genai import GenAI
from benchmarks.speed.protocol import serve


class GenAICaptured(GenAI):
    """genai, with the CUDA provider's option `enable_cuda_graph`."""

    captured = True


if __name__ == "__main__":
    serve(GenAICaptured())

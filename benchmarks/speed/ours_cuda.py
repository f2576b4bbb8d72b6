"""Runs tp-runtime on CUDA, with ordinary decode steps, in which a greedy pick fetches the largest logits alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.ours import Ours
from benchmarks.speed.protocol import serve
from tp_runtime.session import BestLogits, Use


class OursCuda(Ours):
    """The steps that `generate` takes on CUDA."""

    packages = ("tp-runtime", "onnxruntime-gpu", "numpy")
    device = "cuda"

    def load(self, path: Path, threads: int) -> None:
        """Load the model; a session whose steps were to be captured and are not is a failure."""
        super().load(path, threads)
        if self.graph.capture_failure:
            raise RuntimeError(self.graph.capture_failure)

    def reset(self) -> None:
        """Make a new cache under the selected patch."""
        super().reset()
        self.held = Use(self.cache.uses)
        self.cache.take(self.held)

    def step(self, ids: Sequence[int]) -> int:
        """Run one forward step and pick the next id."""
        logits = self.graph.forward_best(ids, self.cache, self.bound, best=self.sampler.best, last=1, held=self.held)
        last = logits[-1]
        if isinstance(last, BestLogits):
            return int(last.ids[last.values.argmax()])
        return int(self.sampler.pick(last, self.cache.tokens, 0))


if __name__ == "__main__":
    serve(OursCuda())

"""Runs llama.cpp on a GGUF file, through llama-cpp-python's low-level `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp import Llama

from benchmarks.speed.protocol import Worker, serve


class LlamaCpp(Worker):
    """llama.cpp with its defaults, except for threads and the size of the context, which it allocates on loading."""

    packages = ("llama-cpp-python",)

    def load(self, path: Path, threads: int) -> None:
        """Map the file, as by default. Layers with a sliding window keep all positions, so that they can rewind."""
        self.model = Llama(
            str(path), n_ctx=self.room, n_threads=threads, n_threads_batch=threads, swa_full=True, verbose=False
        )

    def reset(self) -> None:
        """Empty the cache."""
        self.model.reset()
        self.model._ctx.kv_cache_clear()

    def rewind(self, length: int) -> None:
        """Set the length, so that `eval` drops the positions after it from the cache."""
        self.model.n_tokens = length

    def step(self, ids: Sequence[int]) -> int:
        """Run `ids`, and pick from the logits of the last position only."""
        self.model.eval(list(ids))
        logits = self.model._ctx.get_logits_ith(-1)
        return int(np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp())

"""llama.cpp through llama-cpp-python's low-level `eval`, on a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp import Llama

from benchmarks.speed.protocol import Worker, serve


class LlamaCpp(Worker):
    """Its own defaults, apart from threads and the room for the context, which it allocates when it loads."""

    packages = ("llama-cpp-python",)

    def load(self, path: Path, threads: int) -> None:
        """The file is mapped, as by default. A sliding window's layers keep all positions, so that it can rewind."""
        self.model = Llama(
            str(path), n_ctx=self.room, n_threads=threads, n_threads_batch=threads, swa_full=True, verbose=False
        )

    def reset(self) -> None:
        """An empty cache."""
        self.model.reset()
        self.model._ctx.kv_cache_clear()

    def rewind(self, length: int) -> None:
        """`eval` drops what lies after n_tokens from the cache."""
        self.model.n_tokens = length

    def step(self, ids: Sequence[int]) -> int:
        """Logits of the last position only."""
        self.model.eval(list(ids))
        logits = self.model._ctx.get_logits_ith(-1)
        return int(np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp())

"""Runs tp-runtime on an exported folder in a live session, through the engine's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime  # noqa: F401  (imported before the clock starts: its import is not part of the model's time)

from benchmarks.speed.protocol import Worker, serve
from tp_runtime import Patch, PatchedModel
from tp_runtime.generation import Sampler
from tp_runtime.session import BoundPatch


class Ours(Worker):
    """The graph's forward step and the engine's sampler. A context in the cache is rewound as in a chat."""

    packages: tuple[str, ...] = ("tp-runtime", "onnxruntime", "numpy")
    device = "cpu"
    cuda_graphs = False
    window_cache = False

    def load(self, path: Path, threads: int) -> None:
        """Load the model as an application does, with tokenizer and template."""
        model = PatchedModel.from_pretrained(
            path, self.device, threads=threads, cuda_graphs=self.cuda_graphs, window_cache=self.window_cache
        )
        self.graph, self.sampler = model.graph, Sampler()
        self.bounds: dict[int | str | None, BoundPatch] = {None: self.graph.base}
        self.bound = self.graph.base

    def select(self, patch: int | str | None) -> None:
        """Select a patch. Each patch is bound once, as a loaded patch is."""
        if patch is not None and patch not in self.bounds:
            from tp_runtime.bench import random_patch  # an application does not import it

            made = Patch.load(patch) if isinstance(patch, str) else random_patch(self.graph.folder, patch)
            self.bounds[patch] = self.graph.bind(made)
        if self.bound is not self.bounds[patch]:
            self._held = []  # a cache belongs to a patch
        self.bound = self.bounds[patch]

    def reset(self) -> None:
        """Make a new cache under the selected patch."""
        self.cache = self.graph.new_cache(self.bound)

    def rewind(self, length: int) -> None:
        """Discard the positions after `length`."""
        del self.cache.tokens[length:]

    def step(self, ids: Sequence[int]) -> int:
        """Run one forward step and pick the next id."""
        logits = self.graph.forward(ids, self.cache, self.bound, copy=False)
        return int(self.sampler.pick(logits[-1], self.cache.tokens, 0))


if __name__ == "__main__":
    serve(Ours())

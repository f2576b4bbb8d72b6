"""onnxruntime-genai: on our exported folder, or on a graph of its own builder; its loop, its cache, its search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from benchmarks.speed.protocol import Worker, serve


class GenAI(Worker):
    """Greedy search; a generator is a cache."""

    packages = ("onnxruntime-genai", "onnxruntime")

    def load(self, path: Path, threads: int) -> None:
        """Threads and nothing else of the folder's own configuration is changed."""
        said = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        config = og.Config(str(path))
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(overlay))
        self.model = og.Model(config)
        # Its operator for sliding windows wants a cache that holds a window, and cannot go back.
        self.least = said["model"]["decoder"].get("sliding_window", {}).get("window_size", 0)
        self.can_rewind = not self.least

    def reset(self) -> None:
        """A new generator, with no more room than is needed: it allocates and clears all of it."""
        params = og.GeneratorParams(self.model)
        # An end-of-sequence id would end the generator: so many tokens are asked for that it cannot.
        room = max(self.room, self.least)
        params.set_search_options(do_sample=False, max_length=room, min_length=room)
        self.generator = og.Generator(self.model, params)
        self.last = -1

    def rewind(self, length: int) -> None:
        """As its chat examples do."""
        self.generator.rewind_to(length)
        self.last = -1

    def step(self, ids: Sequence[int]) -> int:
        """Ids are appended, unless they are the one it generated itself and holds already."""
        if list(ids) != [self.last]:
            self.generator.append_tokens(np.array([ids], np.int32))
        self.generator.generate_next_token()
        self.last = int(self.generator.get_next_tokens()[0])
        return self.last


if __name__ == "__main__":
    serve(GenAI())

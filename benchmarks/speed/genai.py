"""Runs onnxruntime-genai with its own loop, cache and search, on our exported folder or its own builder's graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.speed.protocol import Worker, serve


class GenAI(Worker):
    """Greedy search, in which a generator holds the cache."""

    packages: tuple[str, ...] = ("onnxruntime-genai", "onnxruntime")
    captured = False

    def load(self, path: Path, threads: int) -> None:
        """Load the folder with its tokenizer, and change nothing in its configuration but the number of threads."""
        settings = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        config = og.Config(str(path))
        options: dict[str, Any] = {"intra_op_num_threads": threads}
        if "cuda" in str(settings["model"]["decoder"]["session_options"]["provider_options"]):
            self.packages = ("onnxruntime-genai-cuda", "onnxruntime-gpu")
            if self.captured:
                options["provider_options"] = [{"cuda": {"enable_cuda_graph": "1"}}]
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)  # unused, but an application loads it too
        # Its operator for sliding windows needs a cache that holds a whole window, and cannot go back.
        self.least = settings["model"]["decoder"].get("sliding_window", {}).get("window_size", 0)
        self.can_rewind = not self.least

    def reset(self) -> None:
        """Make a generator with no more room than needed, because it allocates and clears all of its room."""
        params = og.GeneratorParams(self.model)
        # The least length equals the room, because otherwise an end-of-sequence id ends the generator.
        room = max(self.room, self.least)
        params.set_search_options(do_sample=False, max_length=room, min_length=room)
        self.generator = og.Generator(self.model, params)
        self.last = -1

    def rewind(self, length: int) -> None:
        """Rewind the generator, as the chat examples of genai do."""
        self.generator.rewind_to(length)
        self.last = -1

    def step(self, ids: Sequence[int]) -> int:
        """Append the ids, unless they are the single id that the generator produced itself and already holds."""
        if list(ids) != [self.last]:
            self.generator.append_tokens(np.array([ids], np.int32))
        self.generator.generate_next_token()
        self.last = int(self.generator.get_next_tokens()[0])
        return self.last


if __name__ == "__main__":
    serve(GenAI())

"""Runs transformers in eager mode, with torch, float32 and its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.speed.protocol import Worker, serve


class TransformersEager(Worker):
    """The model as `from_pretrained` returns it."""

    packages = ("torch", "transformers")

    def load(self, path: Path, threads: int) -> None:
        """Load the model, with its weights mapped from the safetensors file, and its tokenizer."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)  # unused, but an application loads it too
        # The cache of a layer with a sliding window keeps only the window, and cannot go back.
        types = getattr(self.model.config, "layer_types", None) or ()
        self.can_rewind = "sliding_attention" not in types

    def reset(self) -> None:
        """Make a cache of the class that generate() would use."""
        self.cache = DynamicCache(config=self.model.config)

    def rewind(self, length: int) -> None:
        """Cut every layer's keys and values."""
        self.cache.crop(length)

    def step(self, ids: Sequence[int]) -> int:
        """Run `ids`, and compute the logits of the last position only."""
        out = self.model(torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(TransformersEager())

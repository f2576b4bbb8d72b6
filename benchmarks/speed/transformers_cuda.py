"""Runs transformers in eager mode on CUDA, with torch, float16 and its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed.protocol import serve
from benchmarks.speed.transformers_eager import TransformersEager


class TransformersCuda(TransformersEager):
    """The model as `from_pretrained` returns it, in float16 (bfloat16 for Gemma, which overflows in float16)."""

    def load(self, path: Path, threads: int) -> None:
        """Load the model onto the GPU."""
        super().load(path, threads)
        is_gemma = self.model.config.model_type.startswith("gemma")
        self.model = self.model.to("cuda", torch.bfloat16 if is_gemma else torch.float16)

    def step(self, ids: Sequence[int]) -> int:
        """Run `ids`, and compute the logits of the last position only."""
        given = torch.tensor([list(ids)], device="cuda")
        out = self.model(given, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(TransformersCuda())

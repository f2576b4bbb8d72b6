"""Runs optimum's ORTModelForCausalLM on optimum's own export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from benchmarks.speed.protocol import Worker, serve


class OptimumORT(Worker):
    """The model's forward, with the IO binding that the model chooses for the CPU."""

    packages = ("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch")

    def load(self, path: Path, threads: int) -> None:
        """Load the model and its tokenizer, and give torch, which holds its tensors, the same number of threads."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(path, session_options=options, use_cache=True)
        self.tokenizer = AutoTokenizer.from_pretrained(path)  # unused, but an application loads it too

    def reset(self) -> None:
        """Drop the keys and values."""
        self.past: Any = None
        self.length = 0

    def rewind(self, length: int) -> None:
        """Cut every layer's keys and values, which have shape [batch, heads, positions, head size]."""
        self.past = tuple(tuple(part[:, :, :length].contiguous() for part in layer) for layer in self.past)
        self.length = length

    def step(self, ids: Sequence[int]) -> int:
        """Run `ids`, and pick from the logits of the last position; the graph computes those of every position."""
        total = self.length + len(ids)
        out = self.model(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, total, dtype=torch.int64),
            position_ids=torch.arange(self.length, total)[None],
            past_key_values=self.past,
            use_cache=True,
        )
        self.past, self.length = out.past_key_values, total
        return int(out.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(OptimumORT())

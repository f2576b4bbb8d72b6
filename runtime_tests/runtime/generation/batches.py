"""Batches for tests: rows that join them, patches of every kind, and the single sequences that rows have to match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime_tests.fake_graph import BASE
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.generation import Batch, Row, Sampler, Sampling
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import BoundPatch, Graph, Lengths

LEAD = [5, 6, 7]  # the ids that the KV prefixes replace


def join(batch: Batch, prompt: Sequence[int], bound: BoundPatch = BASE, n: Any = 8, **options: Any) -> Row:
    eos = frozenset(options.pop("eos", ()))
    return batch.join(prompt, bound, sampler=Sampler(Sampling(**options)), max_new_tokens=n, eos_ids=eos)


def completion(row: Row) -> list[int]:
    return row.tokens[row.prompt_tokens :]


def some_patches(graph: Graph) -> dict[str, BoundPatch]:
    """Return patches of several ranks and strengths, a sum, only a bias, some slots, KV prefixes, and the base.

    If the graph has full and windowed layers, some KV prefixes have other numbers of entries for each kind.
    """
    folder = graph.folder
    narrow, wide = (patch_for(folder, seed=rank, rank=rank, scale=0.2) for rank in (3, 20))
    bias = patch_for(folder, seed=3, rank=0, scale=0.2)
    part = {key: Delta(bias=d.bias) if key[0] else d for key, d in list(narrow.deltas.items())[:-1]}
    patches = {
        "base": None,
        "narrow": narrow,
        "wide": wide,
        "half": 0.5 * narrow,
        "sum": narrow - 0.5 * wide,
        "bias": bias,
        "part": Patch(part, narrow.config),
        "prefix": with_prefix(Patch({}, narrow.config), folder, LEAD),
        "prefix and deltas": with_prefix(wide, folder, LEAD, entries=12, position=12),
    }
    if folder.windowed is not None:
        patches["fewer entries in windowed layers"] = with_prefix(wide, folder, LEAD, Lengths(20, 6), 25)
        patches["more entries in windowed layers"] = with_prefix(
            Patch({}, bias.config), folder, LEAD, Lengths(4, 13), 14
        )
    return {name: graph.bind(patch) for name, patch in patches.items()}


class SingleSequence:
    """A single sequence that is decoded greedily on the graph.

    Attributes:
        tokens: the prompt and the completion.
        logits: the logits [vocab] of every step.
    """

    def __init__(self, graph: Graph, prompt: list[int], bound: BoundPatch, count: int) -> None:
        cache, tokens = graph.new_cache(bound), list(prompt)
        self.logits = []
        for _ in range(count):
            self.logits.append(graph.forward(tokens[cache.keep_prefix(tokens) :], cache, bound)[0])
            tokens.append(int(self.logits[-1].argmax()))
        self.tokens = tokens


class RecordedBatch:
    """A batch that records logits.

    Attributes:
        batch: the batch.
        logits: the logits [vocab] of every step, by row.
    """

    def __init__(self, graph: Graph, rows: int, prefill_tokens: int = 32) -> None:
        self.batch = Batch(graph, rows, prefill_tokens=prefill_tokens)
        self.logits: dict[Row, list[Any]] = {}
        step = self.batch._rows.step

        def step_and_record(rows: Sequence[Row]) -> np.ndarray:
            logits = step(rows)
            for row, row_logits in zip(rows, logits, strict=True):
                self.logits.setdefault(row, []).append(row_logits.copy())
            return logits

        self.batch._rows.step = step_and_record  # type: ignore[method-assign]

    def run(self) -> None:
        while self.batch.step():
            pass

    def assert_matches(self, row: Row, single: SingleSequence) -> None:
        assert row.tokens == single.tokens[: len(row.tokens)]
        for got, wanted in zip(self.logits[row], single.logits, strict=False):
            assert furthest(got, wanted) < 1e-5


def prompts(count: int) -> list[list[int]]:
    """Return prompts of different lengths; the shortest has one id after the ids that a KV prefix replaces."""
    return [[*LEAD, *token_ids(1 + 7 * i, seed=i)] for i in range(count)]

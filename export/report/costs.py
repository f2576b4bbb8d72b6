"""What each variant costs under tp_runtime: time to the first token, time per token, bytes of keys and values.

The variants take turns on every query, and who starts rotates, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tp_runtime.generation import Sampling, generate
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, KVCache

from ..measure import Arm
from ..progress import bar
from ..rollout import Dialogue

VARIANTS = ("no prompt", "prompt", "prompt, cached prefix", "patch")
_TOKENS = 24


@dataclass(frozen=True)
class Times:
    """Medians over the queries, in ms."""

    first_token_ms: float
    token_ms: float


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; what a saved prefix can hold. At least one token of each is left over."""
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)


def kv_token_bytes(graph: Graph | None, model: Any) -> int:
    """Bytes of keys and values of one token: the graph's, or measured on a torch cache."""
    if graph is not None:
        kv = graph.folder.kv
        return 2 * kv.heads * kv.head_dim * {"f32": 4, "f16": 2}[kv.dtype] * graph.folder.layers
    with torch.no_grad():
        ids = torch.tensor([[1]], device=model.device)
        cache = model(ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def cached_prefix_arm(graph: Graph, prefix: Sequence[int]) -> Arm:
    """The prompted base through the graph with the prefix's keys and values kept from one dialogue to the next."""
    cache = _prefix_cache(graph, prefix)

    def run(dialogue: Dialogue) -> torch.Tensor:
        tokens, first = list(dialogue.teacher()), len(dialogue.teacher_prompt) - 1
        kept = min(cache.keep_prefix(tokens), first)
        del cache.tokens[kept:]
        if kept < first:
            graph.forward(tokens[kept:first], cache, graph.base)
        return torch.from_numpy(graph.forward(tokens[first:], cache, graph.base, all_logits=True))

    return run


def time_variants(graph: Graph, patch: Patch, dialogues: Sequence[Dialogue]) -> dict[str, Times]:
    """Generate a few tokens to every query in every variant. No completion stops early: all do the same work."""
    bound = graph.bind(patch)
    prefix = dialogues[0].teacher_prompt[: shared_prefix([d.teacher_prompt for d in dialogues])]
    cache = _prefix_cache(graph, prefix)
    first: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    later: dict[str, list[float]] = {variant: [] for variant in VARIANTS}

    def once(variant: str, dialogue: Dialogue, tokens: int) -> list[float]:
        prompted = variant in VARIANTS[1:3]
        steps = generate(
            graph,
            dialogue.teacher_prompt if prompted else dialogue.student_prompt,
            bound if variant == "patch" else graph.base,
            sampling=Sampling(),
            max_new_tokens=tokens,
            eos_ids=frozenset(),
            cache=cache if variant == VARIANTS[2] else None,
        )
        seconds, start = [], time.perf_counter()
        for _ in steps:
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        return seconds

    for variant in VARIANTS:
        once(variant, dialogues[0], 2)  # warm-up
    with bar("times", len(dialogues), "query") as shown:
        for i, dialogue in enumerate(dialogues):
            for variant in (VARIANTS[i % len(VARIANTS) :] + VARIANTS)[: len(VARIANTS)]:
                seconds = once(variant, dialogue, _TOKENS)
                first[variant].append(seconds[0])
                later[variant] += seconds[1:]
            shown.update()
    return {
        variant: Times(
            1e3 * statistics.median(first[variant]), 1e3 * statistics.median(later[variant] or first[variant])
        )
        for variant in VARIANTS
    }


def _prefix_cache(graph: Graph, prefix: Sequence[int]) -> KVCache:
    cache = graph.new_cache(graph.base)
    if prefix:
        graph.forward(list(prefix), cache, graph.base)
    return cache

"""The cost of each variant under tp_runtime: time to the first token, time per token, bytes of keys and values.

The variants alternate on every query, and each query starts with another variant. A machine that slows down therefore
slows all variants alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tp_runtime.generation import Sampler, generate
from tp_runtime.patch import KVPrefix, Patch
from tp_runtime.session import Graph, KVCache

from ..progress import bar
from ..rollout import Dialogue
from .figures import CACHED_PREFIX, PATCH, PROMPT, VARIANTS

_TOKENS = 24


@dataclass(frozen=True)
class Times:
    """Medians over the queries.

    Attributes:
        first_token_ms: the time to the first token, in milliseconds.
        token_ms: the time of each further token, in milliseconds.
    """

    first_token_ms: float
    token_ms: float


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of leading tokens that all prompts share, which a saved prefix can hold.

    The result is smaller than the length of the shortest prompt, so at least one token of each prompt remains.
    """
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)


def kv_token_bytes(graph: Graph | None, model: Any) -> int:
    """Return the bytes of keys and values per token: of the graph, or measured on a torch cache if there is none."""
    if graph is not None:
        kv = graph.folder.kv
        return 2 * kv.heads * kv.head_dim * kv.numpy_dtype.itemsize * graph.folder.layers
    with torch.no_grad():
        ids = torch.tensor([[1]], device=model.device)
        cache = model(ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def entry_tokens(prefix: KVPrefix) -> float:
    """Return what a session holds beyond one without the patch's entries, in tokens of keys and values.

    An entry in every layer counts as one token, and so does each of the ids that the entries replace. If the layers
    have different counts, the mean over the layers counts.
    """
    counts = [keys.shape[0] for (_, part), keys in prefix.entries.items() if part == "key"]
    return sum(counts) / len(counts) - len(prefix.replaces)


class CachedPrefixArm:
    """The arm of the prompted base, run by the graph, with a cached prefix.

    The arm keeps the keys and values of the prefix between dialogues.

    Args:
        graph: the exported graph in a session.
        prefix: the token ids that all prompts begin with.
    """

    def __init__(self, graph: Graph, prefix: Sequence[int]) -> None:
        self._graph, self._cache = graph, _prefix_cache(graph, prefix)

    def attached(self) -> AbstractContextManager[None]:
        """Return an empty context: the base has no patch."""
        return nullcontext()

    def __call__(self, dialogue: Dialogue) -> torch.Tensor:
        """Return the logits [completion tokens, vocab]."""
        graph, cache = self._graph, self._cache
        tokens, first = list(dialogue.teacher()), len(dialogue.teacher_prompt) - 1
        kept = min(cache.keep_prefix(tokens), first)
        del cache.tokens[kept:]
        if kept < first:
            graph.forward(tokens[kept:first], cache, graph.base)
        return torch.from_numpy(graph.forward(tokens[first:], cache, graph.base, all_logits=True))


def time_variants(graph: Graph, patch: Patch, dialogues: Sequence[Dialogue]) -> dict[str, Times]:
    """Generate a few tokens for every query in every variant, and return the times of each variant.

    No completion stops early, so all variants do the same work.
    """
    bound = graph.bind(patch)
    prefix = dialogues[0].teacher_prompt[: shared_prefix([d.teacher_prompt for d in dialogues])]
    cache = _prefix_cache(graph, prefix)
    first: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    later: dict[str, list[float]] = {variant: [] for variant in VARIANTS}

    def once(variant: str, dialogue: Dialogue, tokens: int) -> list[float]:
        prompted = variant in (PROMPT, CACHED_PREFIX)
        steps = generate(
            graph,
            dialogue.teacher_prompt if prompted else dialogue.student_prompt,
            bound if variant == PATCH else graph.base,
            sampler=Sampler(),
            max_new_tokens=tokens,
            eos_ids=frozenset(),
            cache=cache if variant == CACHED_PREFIX else None,
        )
        seconds, start = [], time.perf_counter()
        for _ in steps:
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        return seconds

    for variant in VARIANTS:
        once(variant, dialogues[0], 2)  # a warm-up run, not timed
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

"""Batched completions by transformers' own generate, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from ..decoder import TorchPrefix
from .behind import complete_behind
from .ending import Ending
from .store import RolloutStore


def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ending: Ending,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    store: RolloutStore | None = None,
    prefix: TorchPrefix | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, ...]]:
    """Return one completion for each prompt, up to and including the token that ends it.

    Args:
        model: a transformers causal language model.
        prompts: the token ids of each prompt; prompts of similar length share a batch and are padded on the left.
        max_new_tokens: the largest number of tokens of a completion.
        ending: what ends a completion.
        temperature: the sampling temperature; ids are sampled from the whole distribution, and 0.0 is greedy.
        seed: the seed of the samples; the caller's random state stays unchanged.
        batch_size: the number of prompts in a batch.
        store: a store of completions; those that it has are not generated again, and new ones are added to it batch by
            batch.
        prefix: key/value entries that replace the first ids of every prompt.
        progress: a function that is called with the number of prompts just finished.
    """
    completions: list[tuple[int, ...]] = [()] * len(prompts)
    keys: list[str] = []
    if store is not None:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        settings |= {"stop": list(ending.stop)} if ending.stop else {}
        keys = [store.key(prompt, settings) for prompt in prompts]
        completions = [store.get(key) or () for key in keys]
        progress(sum(map(bool, completions)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        # The batches are the same in every run, so that a sampled answer does not depend on which answers were stored.
        if all(completions[i] for i in part):
            continue
        known = sum(bool(completions[i]) for i in part)
        batch = [prompts[i] for i in part]
        if prefix is None:
            found = _generate(model, batch, max_new_tokens, ending, temperature, seed + start)
        else:
            tails = [prompt[len(prefix.replaces) :] for prompt in batch]
            found = complete_behind(model, prefix, tails, max_new_tokens, ending, temperature, seed + start)
        for i, completion in zip(part, found, strict=True):
            completions[i] = completion
        if store is not None:
            store.put({keys[i]: completions[i] for i in part})
        progress(len(part) - known)
    return completions


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ending: Ending, temperature: float, seed: int
) -> list[tuple[int, ...]]:
    """Let transformers' generate complete one batch of whole prompts."""
    pad = min(ending.eos_ids)
    # The model's own configuration may set a repetition penalty or a sampler, which must not affect the completions.
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ending.eos_ids),
        pad_token_id=pad,
        bos_token_id=None,
        **sampling,
    )
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=generation,
            use_model_defaults=False,
        )
    return [ending.cut(out[row, longest:].tolist()) for row in range(len(prompts))]

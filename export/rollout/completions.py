"""Batched completions by transformers' own generate, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from ..decoder import TorchPrefix
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
        prefix: key/value entries that replace the first ids of every prompt. With them completions are greedy and
            generated one prompt at a time, since transformers' generate cannot place text at a given position.
        progress: a function that is called with the number of prompts just finished.
    """
    if prefix is not None:
        found = []
        for prompt in prompts:
            found.append(_after_prefix(model, prefix, prompt, max_new_tokens, ending))
            progress(1)
        return found
    completions: list[tuple[int, ...]] = [()] * len(prompts)
    keys: list[str] = []
    if store is not None:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        settings |= {"stop": list(ending.stop)} if ending.stop else {}
        keys = [store.key(prompt, settings) for prompt in prompts]
        completions = [store.get(key) or () for key in keys]
        progress(sum(map(bool, completions)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
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
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        # The batches are the same in every run, so that a sampled answer does not depend on which answers were stored.
        if all(completions[i] for i in part):
            continue
        known = sum(bool(completions[i]) for i in part)
        longest = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed + start)
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=generation,
                use_model_defaults=False,
            )
        for row, i in enumerate(part):
            completions[i] = ending.cut(out[row, longest:].tolist())
        if store is not None:
            store.put({keys[i]: completions[i] for i in part})
        progress(len(part) - known)
    return completions


def _after_prefix(
    model: Any, prefix: TorchPrefix, prompt: Sequence[int], max_new_tokens: int, ending: Ending
) -> tuple[int, ...]:
    cache = prefix.cache()
    ids = torch.tensor([list(prompt[len(prefix.replaces) :])], device=model.device)
    answer: list[int] = []
    position = prefix.position
    while len(answer) < max_new_tokens and not ending.reached(answer):
        offsets = torch.arange(ids.shape[1], device=model.device)
        with torch.no_grad():
            out = model(
                ids,
                position_ids=position + offsets[None],
                cache_position=cache.get_seq_length() + offsets,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        position += ids.shape[1]
        answer.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([answer[-1:]], device=model.device)
    return tuple(answer)

"""Completions of many prompts behind one set of key/value entries, whose ids are not run again.

transformers' own generate cannot place text at a given position after a cache that a batch shares, so the loop is here.
The rows' texts are padded on the left; padding takes no place and nobody sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..decoder import TorchPrefix
from .ending import Ending


@torch.no_grad()
def complete_behind(
    model: Any,
    prefix: TorchPrefix,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ending: Ending,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """Return one completion for each prompt, up to and including the id that ends it.

    Args:
        model: a transformers causal language model.
        prefix: the entries.
        prompts: the ids of each prompt after those that the entries replace.
        max_new_tokens: the largest number of tokens of a completion.
        ending: what ends a completion.
        temperature: the sampling temperature; 0.0 is greedy.
        seed: the seed of the samples.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        valid[row, longest - len(prompt) :] = True
    ids, valid = ids.to(model.device), valid.to(model.device)
    # A padding token gets the first position, which every model has.
    positions = prefix.position + (valid.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        with prefix.before(model, valid=valid):
            logits = model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
                :, -1
            ]
        picked = _pick(logits.float(), temperature, generator)
        for row, token in enumerate(picked.tolist()):
            if row in running:
                answers[row].append(token)
        running = [row for row in running if not ending.reached(answers[row])]
        if not running:
            break
        ids, positions = picked[:, None], positions[:, -1:] + 1
        valid = torch.cat([valid, valid.new_ones(len(prompts), 1)], 1)
    return [tuple(answer) for answer in answers]


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if not temperature:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

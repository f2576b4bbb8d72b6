"""This module chooses the key/value entries of the context that a patch stores.

Every layer and key/value head keeps the n entries of the context that completions attend to most. The measure is the
attention mass of the completion rows of the calibration dialogues, summed over the query heads that share the key/value
head. All entries together are the cached prompt, which is exact. Fewer entries leave a difference for the weights to
correct, and the weights are fitted with the prefix in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tp_runtime.errors import CalibrationError

from ..decoder import Block, TorchPrefix, blocks_of
from ..rollout import Dialogue


def choose_entries(
    model: Any,
    dialogues: Sequence[Dialogue],
    entries: int,
    progress: Callable[[], None] = lambda: None,
) -> TorchPrefix:
    """Choose the entries to keep from the beginning of the teacher's prompts, before the query.

    Args:
        model: a transformers causal language model that has an adapter.
        dialogues: the calibration sequences.
        entries: the number of entries to keep per head, at least 1. If the beginning has no more, all are kept.
        progress: a callback that runs after each dialogue.

    Returns:
        The chosen entries, with the ids that they replace.

    Raises:
        CalibrationError: the teacher's and the student's prompts differ in more than one fixed beginning.
    """
    beginning, replaces = _fixed_beginnings([(d.teacher_prompt, d.student_prompt) for d in dialogues])
    ids = torch.tensor([beginning], device=model.device)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    if entries < len(beginning):
        masses = _attention_masses(model, dialogues, len(beginning), keys[0].shape[1], progress)
        for layer, mass in enumerate(masses):
            # [kv heads, entries], in order of position
            kept = mass.topk(entries, -1).indices.sort(-1).values.to(keys[layer].device)
            index = kept[None, :, :, None].expand(-1, -1, -1, keys[layer].shape[3])
            keys[layer], values[layer] = keys[layer].gather(2, index), values[layer].gather(2, index)
    return TorchPrefix(keys, values, replaces, len(beginning))


def check_prefix(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    entries: int,
    template: str | None,
    config: Any,
    max_new_tokens: int,
) -> None:
    """Check, before the rollout, that a KV prefix can stand in for the beginning of these prompts.

    Args:
        prompts: the token ids of every query, with the context and without it.
        entries: the number of entries to keep per head.
        template: the source of the chat template, or None if there is none.
        config: the model's transformers config.
        max_new_tokens: the length of the completions.

    Raises:
        CalibrationError: the prompts differ in more than one fixed beginning; the template writes the date, so that
            tomorrow's prompts begin differently; or layers with a sliding window would forget what the entries keep.
    """
    beginning, _ = _fixed_beginnings(prompts)
    if "strftime_now" in (template or ""):
        raise CalibrationError(
            "the chat template writes the date, so tomorrow's prompts would begin differently",
            field="--prefix",
            got="strftime_now in the template",
            wanted="a template whose beginning is the same every day",
            fix="fit a patch without a prefix",
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    longest = max(len(teacher) for teacher, _ in prompts) + max_new_tokens
    # If all entries are kept, they are at their own positions, and every window sees what it should.
    if window is not None and "sliding_attention" in kinds and longest > window and entries < len(beginning):
        raise CalibrationError(
            "layers with a sliding window forget the beginning of this context, but kept entries would stay visible",
            field="--prefix",
            got=f"{longest} tokens of context, query and answer",
            wanted=f"at most {window}, the size of the window",
            fix="shorten the context, or fit a patch without a prefix",
        )


def _fixed_beginnings(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the beginnings of the prompts with and without the context; after them both prompts are the same."""
    beginnings = set()
    for teacher, student in prompts:
        same = zip(reversed(teacher), reversed(student), strict=False)
        tail = next((i for i, (one, other) in enumerate(same) if one != other), min(len(teacher), len(student)))
        beginnings.add((tuple(teacher[: len(teacher) - tail]), tuple(student[: len(student) - tail])))
    if len(beginnings) != 1 or not next(iter(beginnings))[0]:
        raise CalibrationError(
            "the prompts with and without the context do not differ in one fixed beginning",
            field="--prefix",
            got=f"{len(beginnings)} different beginnings",
            wanted="a chat template (or a completion style) that puts the context in front of the query",
            fix="fit a patch without a prefix",
        )
    return beginnings.pop()


def _attention_masses(
    model: Any, dialogues: Sequence[Dialogue], length: int, heads: int, progress: Callable[[], None]
) -> list[Tensor]:
    """Return the attention of the completion rows to the context's positions, for each layer [kv heads, length]."""
    blocks = blocks_of(model)
    masses = [torch.zeros(heads, length, device=model.device) for _ in blocks]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only implementation that returns attention weights
    try:
        for dialogue in dialogues:
            first = len(dialogue.teacher_prompt) - 1
            with ExitStack() as stack, torch.no_grad():
                for block in blocks:
                    _add_up_attention(block, stack, masses[block.index], first)
                model(torch.tensor([dialogue.teacher()], device=model.device), use_cache=False, logits_to_keep=1)
            progress()
    finally:
        model.set_attn_implementation(before)
    return masses


def _add_up_attention(block: Block, stack: ExitStack, mass: Tensor, first: int) -> None:
    """Add the block's attention weights of the rows from `first` on to `mass` whenever the block runs."""

    def add(_module: Any, _args: Any, outputs: Any) -> None:
        weights = outputs[1][0, :, first:, : mass.shape[1]].float()  # [query heads, rows, length]
        mass.add_(weights.sum(1).view(mass.shape[0], -1, mass.shape[1]).sum(1).to(mass.device))

    attention = block.layer.get_submodule(block.adapter.attention)
    stack.callback(attention.register_forward_hook(add).remove)

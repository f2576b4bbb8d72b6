"""Which key/value entries of the context a patch carries.

Every layer and key/value head keeps the n entries of the context that completions attend to most (attention mass of
the completion rows of the calibration dialogues, summed over the query heads that share the head). All of them is the
cached prompt and exact; fewer leave something for the weights to make up, which are fitted with the prefix in place.
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
    """Keep `entries` entries a head of what the teacher's prompts begin with before the query.

    Args:
        model: a transformers causal language model with an adapter.
        dialogues: the calibration sequences.
        entries: at least 1; as many as there are, or more, keep all.
        progress: called after each dialogue.

    Raises:
        CalibrationError: teacher's and student's prompts differ in more than one fixed beginning.
    """
    lead, replaces = _fixed_leads([(d.teacher_prompt, d.student_prompt) for d in dialogues])
    ids = torch.tensor([lead], device=model.device)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    if entries < len(lead):
        masses = _attention_masses(model, dialogues, len(lead), keys[0].shape[1], progress)
        for layer, mass in enumerate(masses):
            # [kv heads, entries], in order of position
            kept = mass.topk(entries, -1).indices.sort(-1).values.to(keys[layer].device)
            index = kept[None, :, :, None].expand(-1, -1, -1, keys[layer].shape[3])
            keys[layer], values[layer] = keys[layer].gather(2, index), values[layer].gather(2, index)
    return TorchPrefix(keys, values, replaces, len(lead))


def check_prefix(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    entries: int,
    template: str | None,
    config: Any,
    max_new_tokens: int,
) -> None:
    """Find out before the rollout that a KV prefix cannot stand in for the beginning of these prompts.

    Args:
        prompts: of every query, the ids with the context and without it.
        entries: how many are to be kept.
        template: the chat template's source, if there is one.
        config: transformers' config of the model.
        max_new_tokens: length of the completions.

    Raises:
        CalibrationError: the prompts differ in more than one fixed beginning; the template writes the date, so that
            tomorrow's prompts begin otherwise; or layers with a sliding window would forget what the entries keep.
    """
    lead, _ = _fixed_leads(prompts)
    if "strftime_now" in (template or ""):
        raise CalibrationError(
            "the chat template writes the date, and tomorrow's prompts would begin otherwise",
            field="--prefix",
            got="strftime_now in the template",
            wanted="a template whose beginning is the same every day",
            fix="fit a patch without a prefix",
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    longest = max(len(teacher) for teacher, _ in prompts) + max_new_tokens
    # All entries are at their own places, and any window sees what it should.
    if window is not None and "sliding_attention" in kinds and longest > window and entries < len(lead):
        raise CalibrationError(
            "layers with a sliding window forget the beginning of this context, and kept entries would stay in sight",
            field="--prefix",
            got=f"{longest} tokens of context, query and answer",
            wanted=f"at most the window, {window}",
            fix="shorten the context, or fit a patch without a prefix",
        )


def _fixed_leads(prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What prompts with and without the context begin with, up to where all that follows is the same."""
    leads = set()
    for teacher, student in prompts:
        same = zip(reversed(teacher), reversed(student), strict=False)
        tail = next((i for i, (one, other) in enumerate(same) if one != other), min(len(teacher), len(student)))
        leads.add((tuple(teacher[: len(teacher) - tail]), tuple(student[: len(student) - tail])))
    if len(leads) != 1 or not next(iter(leads))[0]:
        raise CalibrationError(
            "the prompts with and without the context do not differ in one fixed beginning",
            field="--prefix",
            got=f"{len(leads)} different beginnings",
            wanted="a chat template (or a completion style) that puts the context in front of the query",
            fix="fit a patch without a prefix",
        )
    return leads.pop()


def _attention_masses(
    model: Any, dialogues: Sequence[Dialogue], lead: int, heads: int, progress: Callable[[], None]
) -> list[Tensor]:
    """For every layer [kv heads, lead]: attention of the completion rows to the positions of the context."""
    blocks = blocks_of(model)
    masses = [torch.zeros(heads, lead, device=model.device) for _ in blocks]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    try:
        for dialogue in dialogues:
            first = len(dialogue.teacher_prompt) - 1
            with ExitStack() as stack, torch.no_grad():
                for block in blocks:
                    _watch(block, stack, masses[block.index], first)
                model(torch.tensor([dialogue.teacher()], device=model.device), use_cache=False, logits_to_keep=1)
            progress()
    finally:
        model.set_attn_implementation(before)
    return masses


def _watch(block: Block, stack: ExitStack, mass: Tensor, first: int) -> None:
    """Add the block's attention weights of the rows from `first` on to `mass` whenever it runs."""

    def add(_module: Any, _args: Any, outputs: Any) -> None:
        weights = outputs[1][0, :, first:, : mass.shape[1]].float()  # [query heads, rows, lead]
        mass.add_(weights.sum(1).view(mass.shape[0], -1, mass.shape[1]).sum(1).to(mass.device))

    attention = block.layer.get_submodule(block.adapter.attention)
    stack.callback(attention.register_forward_hook(add).remove)

"""Free-running: what the models write when nobody holds their hand, and how far apart they are while they do.

`forced` figures are taken on the prompted model's text, `own` figures on the patched model's: at each token of its own
answer, how far is it from what the prompted model would say after the same words?
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from tp_runtime.patch import Patch

from ..decoder import patched, torch_prefix
from ..measure import Divergence, diverge, torch_student, with_prompt, without_prompt
from ..progress import bar
from ..rollout import Dialogue, complete
from ..source import Source
from .figures import Curve, Ending, Long, Turn, Turns

VARIANTS = ("no prompt", "prompt", "patch")
_BINS = 8
Completion = tuple[int, ...]


def answers(
    source: Source, model: Any, patch: Patch | None, prompts: Sequence[Sequence[int]], limit: int, label: str
) -> list[Completion]:
    """Greedy completions of `prompts`, up to `limit` tokens, under a patch or none."""
    prefix = None if patch is None else torch_prefix(patch, model)
    with bar(label, len(prompts), "query") as shown, patched(model, patch) if patch else nullcontext():
        return complete(model, prompts, limit, source.codec.eos_ids, prefix=prefix, progress=shown.update)


def endings(source: Source, completions: dict[str, list[Completion]]) -> list[Ending]:
    """How the completions of each variant end."""
    eos = source.codec.eos_ids
    return [
        Ending(
            name,
            ended=float(np.mean([bool(c) and c[-1] in eos for c in found])),
            silent=float(np.mean([not source.codec.decode(c).strip() for c in found])),
            tokens=float(np.mean([len(c) for c in found])),
        )
        for name, found in completions.items()
    ]


def distinct(completions: Sequence[Completion]) -> float:
    """Distinct share of all 3-grams, each completion for itself; 1 where none is that long."""
    grams = [{c[i : i + 3] for i in range(len(c) - 2)} for c in completions]
    total = sum(max(0, len(c) - 2) for c in completions)
    return sum(map(len, grams)) / total if total else 1.0


def curve(unpatched: Divergence, patched: Divergence, width: int) -> Curve:
    """Two divergences on the same tokens, by position."""
    means, tokens = patched.by_position(width)
    return Curve(width, unpatched.by_position(width)[0], means, tokens)


def measure_long(source: Source, model: Any, patch: Patch, dialogues: Sequence[Dialogue], limit: int) -> Long:
    """Completions of up to `limit` tokens to the prompts of `dialogues`."""
    prompts = {
        "no prompt": (None, [d.student_prompt for d in dialogues]),
        "prompt": (None, [d.teacher_prompt for d in dialogues]),
        "patch": (patch, [d.student_prompt for d in dialogues]),
    }
    found = {
        variant: answers(source, model, under, of, limit, f"{limit} tokens, {variant}")
        for variant, (under, of) in prompts.items()
    }
    width = max(1, -(-limit // _BINS))
    curves = {}
    for variant in ("prompt", "patch"):
        texts = [
            Dialogue(d.teacher_prompt, d.student_prompt, c) for d, c in zip(dialogues, found[variant], strict=True)
        ]
        curves[variant] = curve(*_both(model, patch, texts, f"fidelity along the text of {variant}"), width)
    return Long(limit, len(dialogues), curves["prompt"], curves["patch"], endings(source, found))


def measure_turns(
    source: Source,
    model: Any,
    context: str,
    patch: Patch,
    openings: Sequence[str],
    follow_ups: Sequence[str],
    limit: int,
    turns: int = 3,
) -> Turns:
    """Dialogues that open with a query and go on with scripted follow-ups; each model answers its own dialogue.

    Args:
        source, model, context, patch: who talks.
        openings: the first user turn of each dialogue.
        follow_ups: the later ones, dialogue i starting at the i-th.
        limit: tokens of one answer.
        turns: user turns of a dialogue.
    """
    if source.style != "chat":
        return Turns(0, limit, [], {}, "the model is of completion style: it has no turns")
    messages: dict[str, list[list[dict[str, str]]]] = {variant: [[] for _ in openings] for variant in VARIANTS}
    measured: list[Turn] = []
    why_not = ""
    for turn in range(turns):
        for of_variant in messages.values():
            for i, dialogue in enumerate(of_variant):
                said = openings[i] if turn == 0 else follow_ups[(i + turn - 1) % len(follow_ups)]
                dialogue.append({"role": "user", "content": said})
        plain = {variant: [tuple(source.codec.render(m)) for m in messages[variant]] for variant in VARIANTS}
        framed = {variant: [tuple(source.codec.render(m, context)) for m in messages[variant]] for variant in VARIANTS}
        if max(len(ids) for of in framed.values() for ids in of) + limit > model.config.max_position_embeddings:
            why_not = f"turn {turn + 1} does not fit the context window"
            break
        found = {
            variant: answers(
                source,
                model,
                patch if variant == "patch" else None,
                (framed if variant == "prompt" else plain)[variant],
                limit,
                f"turn {turn + 1}, {variant}",
            )
            for variant in VARIANTS
        }
        both = {}
        for variant in ("prompt", "patch"):
            texts = [Dialogue(*parts) for parts in zip(framed[variant], plain[variant], found[variant], strict=True)]
            both[variant] = _both(model, patch, texts, f"fidelity of turn {turn + 1}, text of {variant}")
        (forced_base, forced), (own_base, own) = both["prompt"], both["patch"]
        measured.append(
            Turn(
                turn + 1,
                forced_base.mean,
                forced.mean,
                gap_closed(forced_base.mean, forced.mean),
                own_base.mean,
                own.mean,
                gap_closed(own_base.mean, own.mean),
                endings(source, found),
            )
        )
        for variant, of_variant in messages.items():
            for dialogue, completion in zip(of_variant, found[variant], strict=True):
                dialogue.append({"role": "assistant", "content": source.codec.decode(completion).strip()})
    shown = {variant: [(m["role"], m["content"]) for m in messages[variant][0]] for variant in VARIANTS}
    return Turns(len(openings), limit, measured, shown, why_not)


def gap_closed(unpatched: float, patched: float) -> float:
    """1 - KL(patched) / KL(unpatched)."""
    return 1 - patched / unpatched


def _both(model: Any, patch: Patch, texts: Sequence[Dialogue], label: str) -> tuple[Divergence, Divergence]:
    """(unpatched, patched) against the prompted model on the same texts."""
    arms = {
        "unpatched": without_prompt(torch_student(model)),
        "patched": without_prompt(torch_student(model, patch)),
    }
    with bar(label, len(texts), "query") as shown:
        found = diverge(texts, with_prompt(torch_student(model)), arms, shown.update)
    return found["unpatched"], found["patched"]

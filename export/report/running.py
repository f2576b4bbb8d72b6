"""Free-running text: what each model generates by itself, and how far the patched model then is from the prompted one.

`forced` figures are measured along the prompted model's text, `own` figures along the patched model's text. An `own`
figure compares the patched model, at each token of its own answer, with the prompted model after the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tp_runtime.patch import Patch

from ..measure import (
    Completion,
    Divergence,
    TorchStudent,
    cached_teacher,
    diverge,
    measure_closeness,
    torch_answers,
    with_prompt,
    within_stop,
    without_prompt,
)
from ..progress import bar
from ..rollout import Dialogue, Prompting
from ..rollout import Ending as End
from ..source import Source
from .figures import NO_PROMPT, PATCH, PROMPT, Curve, Ending, Long, Turn, Turns

_SPEAKERS = (NO_PROMPT, PROMPT, PATCH)  # with a cached prefix the model writes the same text as with the prompt
_BINS = 8


def endings(source: Source, completions: dict[str, list[Completion]], stop: Sequence[str] = ()) -> list[Ending]:
    """Return how the completions of each variant end; one that reaches a stop string has ended."""
    codec, end = source.codec, End.of(source.codec, stop)
    return [
        Ending(
            name,
            ended=float(np.mean([end.reached(c) for c in found])),
            silent=float(np.mean([not within_stop(codec.decode(c), stop).strip() for c in found])),
            tokens=float(np.mean([len(c) for c in found])),
        )
        for name, found in completions.items()
    ]


def distinct(completions: Sequence[Completion]) -> float:
    """Return the share of all 3-grams that are distinct within their completion.

    The share is 1 if no completion has three tokens.
    """
    grams = [{c[i : i + 3] for i in range(len(c) - 2)} for c in completions]
    total = sum(max(0, len(c) - 2) for c in completions)
    return sum(map(len, grams)) / total if total else 1.0


def curve(unpatched: Divergence, patched: Divergence, width: int) -> Curve:
    """Return two divergences on the same tokens as means in bins of `width` positions."""
    means, tokens = patched.by_position(width)
    return Curve(width, unpatched.by_position(width)[0], means, tokens)


def measure_long(
    source: Source, model: Any, patch: Patch, dialogues: Sequence[Dialogue], limit: int, stop: Sequence[str] = ()
) -> Long:
    """Measure completions of up to `limit` tokens that each model generates for the prompts of `dialogues`.

    A completion ends with the token that completes a string of `stop`.
    """
    prompts = {
        NO_PROMPT: (None, [d.student_prompt for d in dialogues]),
        PROMPT: (None, [d.teacher_prompt for d in dialogues]),
        PATCH: (patch, [d.student_prompt for d in dialogues]),
    }
    found = {
        variant: torch_answers(source, model, under, limit, stop)(asked, f"{limit} tokens, {variant}")
        for variant, (under, asked) in prompts.items()
    }
    width = max(1, -(-limit // _BINS))
    curves = {}
    for variant in (PROMPT, PATCH):
        texts = [
            Dialogue(d.teacher_prompt, d.student_prompt, c) for d, c in zip(dialogues, found[variant], strict=True)
        ]
        curves[variant] = curve(*_both(model, patch, texts, f"fidelity along the text of {variant}"), width)
    return Long(limit, len(dialogues), curves[PROMPT], curves[PATCH], endings(source, found, stop))


def measure_turns(
    source: Source,
    model: Any,
    asked: Prompting,
    patch: Patch,
    openings: Sequence[str],
    follow_ups: Sequence[str],
    limit: int,
    turns: int = 3,
    stop: Sequence[str] = (),
) -> Turns:
    """Measure dialogues that open with a query and continue with scripted follow-ups.

    Each model answers in its own copy of every dialogue.

    Args:
        source: the base model, whose codec renders the dialogues.
        model: the same model, loaded.
        asked: how the dialogues are asked with the prompt of the prompted model and without it.
        patch: the patch of the patched model.
        openings: the first user message of each dialogue.
        follow_ups: the later user messages; dialogue i begins with the i-th of them.
        limit: the largest number of tokens of one answer.
        turns: the number of user messages in a dialogue.
        stop: the strings that end an answer.

    Returns:
        The figures of each turn. There are none for a completion-style model, and the turns that no longer fit the
        context window are missing; `why_not` then states the reason.
    """
    if source.style != "chat":
        return Turns(0, limit, [], {}, "the model is completion-style, so it has no chat turns")
    messages: dict[str, list[list[dict[str, str]]]] = {variant: [[] for _ in openings] for variant in _SPEAKERS}
    measured: list[Turn] = []
    why_not = ""
    for turn in range(turns):
        for of_variant in messages.values():
            for i, dialogue in enumerate(of_variant):
                text = openings[i] if turn == 0 else follow_ups[(i + turn - 1) % len(follow_ups)]
                dialogue.append({"role": "user", "content": text})
        student = {v: [tuple(asked.student(m)) for m in messages[v]] for v in _SPEAKERS}
        teacher = {v: [tuple(asked.teacher(m)) for m in messages[v]] for v in _SPEAKERS}
        longest = max(len(ids) for prompts in teacher.values() for ids in prompts)
        if longest + limit > model.config.max_position_embeddings:
            why_not = f"turn {turn + 1} does not fit the context window"
            break
        found = {
            variant: torch_answers(source, model, patch if variant == PATCH else None, limit, stop)(
                (teacher if variant == PROMPT else student)[variant], f"turn {turn + 1}, {variant}"
            )
            for variant in _SPEAKERS
        }
        both = {}
        for variant in (PROMPT, PATCH):
            texts = [Dialogue(*parts) for parts in zip(teacher[variant], student[variant], found[variant], strict=True)]
            both[variant] = _both(model, patch, texts, f"fidelity of turn {turn + 1}, text of {variant}")
        (forced_base, forced), (own_base, own) = both[PROMPT], both[PATCH]
        measured.append(
            Turn(
                turn + 1,
                forced_base.mean,
                measure_closeness(forced_base, forced),
                own_base.mean,
                measure_closeness(own_base, own),
                endings(source, found, stop),
            )
        )
        for variant, of_variant in messages.items():
            for dialogue, completion in zip(of_variant, found[variant], strict=True):
                text = within_stop(source.codec.decode(completion), stop).strip()
                dialogue.append({"role": "assistant", "content": text})
    system = asked.system(openings[0])
    first = [] if system is None else [("system", system)]
    shown = {v: [*first, *((m["role"], m["content"]) for m in messages[v][0])] for v in _SPEAKERS}
    return Turns(len(openings), limit, measured, shown, why_not)


def _both(model: Any, patch: Patch, texts: Sequence[Dialogue], label: str) -> tuple[Divergence, Divergence]:
    """Return the divergences (unpatched, patched) from the prompted model on the same texts."""
    arms = {
        "unpatched": without_prompt(TorchStudent(model)),
        "patched": without_prompt(TorchStudent(model, patch)),
    }
    with bar(label, len(texts), "query") as shown:
        found = diverge(texts, with_prompt(cached_teacher(model, texts)), arms, shown.update)
    return found["unpatched"], found["patched"]

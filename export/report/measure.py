"""The measurement of a report's figures, from patches and their prompts.

This module draws nothing and prints only progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tp_runtime.patch import Patch

from ..measure import Divergence, TorchStudent, cached_teacher, diverge, measure_closeness, with_prompt, without_prompt
from ..progress import bar
from ..rollout import Context, Dialogue, RolloutStore, dialogues_for
from . import compare, locality, running
from .figures import NO_PROMPT, PATCH, Answer, Composed, Layer, PatchReport, Strength, Sweep
from .frontier import measure_frontier
from .known import Known
from .setup import LONG, Setup, Subject, check_long
from .variants import measure_variants

__all__ = [
    "STRENGTHS",
    "Setup",
    "Subject",
    "check_long",
    "layer_effects",
    "measure_composition",
    "measure_patch",
    "sweep",
]

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
# Strengths and layers take many passes, so they are measured on a few held-out answers, and layers only on the first
# tokens of these answers.
_SUBSET, _SUBSET_TOKENS = 4, 32
_DIALOGUES = 4
_SHOWN, _WORST = 3, 3


def measure_patch(setup: Setup, subject: Subject) -> PatchReport:
    """Measure every figure that is reported on one patch.

    Raises:
        CalibrationError: there are no queries, every completion is empty, none has a stop string, or the prompt has no
            effect.
        RequestError: a query does not fit the context window.
    """
    source, model, patch, stop = setup.source, setup.model, subject.patch, subject.stop
    held = _held_out(setup, subject)
    known = Known.of(setup, subject, held)
    variants, base, own = measure_variants(setup, subject, held, known)
    long = running.measure_long(source, model, patch, held[:LONG], setup.long, stop) if setup.long else None
    openings, follow_ups = subject.queries[:_DIALOGUES], locality.built_in("follow-ups")
    limit = setup.max_new_tokens
    asked = setup.asked(subject)
    turns = running.measure_turns(source, model, asked, patch, openings, follow_ups, limit, stop=stop)
    some = held[:_SUBSET]
    short = [replace(d, completion=d.completion[:_SUBSET_TOKENS]) for d in some]
    with TemporaryDirectory() as folder:  # several fits share the answers to the calibration queries
        store = RolloutStore(Path(folder) / "answers.jsonl", source.digest)
        fits, retained = compare.measure_fits(setup, subject, held, base, store)
        frontier = measure_frontier(setup, subject, held, known, store) if setup.frontier else None
    shown, worst = _answers(setup, subject, held, own)
    return PatchReport(
        name=patch.name,
        identity=patch.identity,
        method=patch.config.method,
        rank=patch.rank,
        sites=sorted({site for _, site in patch.deltas}),
        entries=[] if patch.prefix is None else sorted(set(patch.prefix.counts)),
        stop=list(stop),
        file=subject.file.name,
        file_bytes=subject.file.stat().st_size,
        created=patch.config.created,
        prompt=subject.context,
        systems=list(dict.fromkeys(found for found in map(asked.system, subject.queries) if found is not None)),
        prompt_tokens=len(source.codec.render(subject.context, raw=True)),
        added_tokens=len(held[0].teacher_prompt) - len(held[0].student_prompt),
        queries=len(held),
        completion_tokens=sum(len(d.completion) for d in held),
        known_answers=len(known.queries),
        variants=variants,
        positions=running.curve(base, own, max(1, setup.max_new_tokens // 24)),
        layers=layer_effects(model, patch, short, retained),
        sweep=sweep(setup, subject, some),
        frontier=frontier,
        long=long,
        turns=turns,
        fits=fits,
        answers=shown,
        worst=worst,
    )


def _held_out(setup: Setup, subject: Subject) -> list[Dialogue]:
    """Let the prompted model answer the held-out queries."""
    asked, queries = setup.asked(subject), subject.queries
    cached = Context.of(setup.model, asked, asked.pairs(queries)).cached
    return dialogues_for(setup.model, asked, queries, setup.max_new_tokens, stop=subject.stop, cached=cached)


def layer_effects(
    model: Any, patch: Patch, dialogues: Sequence[Dialogue], retained: dict[int, dict[str, float]]
) -> list[Layer]:
    """Measure the KL with one layer's deltas switched off and those of all other layers on, for each layer.

    Each of the L arms runs all L layers, so the cost grows with the square of the number of layers.
    """
    layers = sorted({layer for layer, _ in patch.deltas})
    student = TorchStudent(model, patch)
    arms = {
        "none": without_prompt(TorchStudent(model)),
        "all": without_prompt(student),
        **{str(i): without_prompt(student.without_layer(i)) for i in layers},
    }
    with bar("layers switched off", len(dialogues), "query") as progress:
        found = diverge(dialogues, with_prompt(cached_teacher(model, dialogues)), arms, progress.update)
    gap, own = found["none"].mean, found["all"].mean
    return [Layer(i, retained.get(i, {}), found[str(i)].mean, (found[str(i)].mean - own) / gap) for i in layers]


def sweep(setup: Setup, subject: Subject, dialogues: Sequence[Dialogue]) -> Sweep | None:
    """Measure the patch at strengths from -1 to 2.

    Returns:
        The KL on the prompted model's answers and the free-running text at each strength. None for a patch with a KV
        prefix, since such a patch cannot be scaled.
    """
    model, patch = setup.model, subject.patch
    if patch.prefix is not None:
        return None
    scaled = {strength: strength * patch for strength in STRENGTHS}
    arms = {str(s): without_prompt(TorchStudent(model, under)) for s, under in scaled.items()}
    with bar("strengths", len(dialogues), "query") as progress:
        found = diverge(dialogues, with_prompt(cached_teacher(model, dialogues)), arms, progress.update)
    prompts = [d.student_prompt for d in dialogues]
    written = {s: setup.in_torch(subject, under)(prompts, f"strength {s:g}") for s, under in scaled.items()}
    return Sweep(
        query=subject.queries[0],
        prompted_answer=setup.text(subject, dialogues[0].completion),
        prompted_distinct=running.distinct([d.completion for d in dialogues]),
        strengths=[
            Strength(s, found[str(s)].mean, running.distinct(written[s]), setup.text(subject, written[s][0]))
            for s in STRENGTHS
        ],
    )


def _answers(
    setup: Setup, subject: Subject, held: list[Dialogue], own: Divergence
) -> tuple[list[Answer], list[Answer]]:
    """Return the answers to the first few held-out queries, and to those of the others with the largest KL."""
    kl = own.by_dialogue()
    first = list(range(len(held)))[:_SHOWN]
    worst = sorted(range(len(first), len(held)), key=lambda i: -kl[i])[:_WORST]
    prompts = [held[i].student_prompt for i in first + worst]
    plain, patched = (
        setup.in_torch(subject, patch)(prompts, f"answers, {variant}")
        for variant, patch in ((NO_PROMPT, None), (PATCH, subject.patch))
    )
    text = [
        Answer(subject.queries[i], kl[i], *(setup.text(subject, c) for c in (p, held[i].completion, q)))
        for i, p, q in zip(first + worst, plain, patched, strict=True)
    ]
    return text[: len(first)], text[len(first) :]


def measure_composition(setup: Setup, subjects: Sequence[Subject]) -> list[Composed]:
    """Measure how well the sum of all patches works on each patch's own held-out queries, against its own prompt."""
    model = setup.model
    results = []
    for subject in subjects:
        others = reduce(add, (s.patch for s in subjects if s is not subject))
        everything = subject.patch + others
        held = _held_out(setup, subject)
        under = {"none": None, "alone": subject.patch, "others": others, "together": everything}
        arms = {name: without_prompt(TorchStudent(model, patch)) for name, patch in under.items()}
        with bar(f"composition, {subject.patch.name}", len(held), "query") as progress:
            found = diverge(held, with_prompt(cached_teacher(model, held)), arms, progress.update)
        close = {name: measure_closeness(found["none"], found[name]) for name in ("alone", "others", "together")}
        prompt = [held[0].student_prompt]
        texts = [
            setup.text(subject, setup.in_torch(subject, patch)(prompt, label)[0])
            for patch, label in ((subject.patch, "answer of the patch"), (everything, "answer of the sum"))
        ]
        results.append(
            Composed(subject.patch.name, close["alone"], close["others"], close["together"], subject.queries[0], *texts)
        )
    return results

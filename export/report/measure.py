"""The measurement of a report's figures, from patches and their prompts.

This module draws nothing and prints only progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

from tp_runtime.errors import RequestError
from tp_runtime.patch import Patch
from tp_runtime.session import Graph

from ..measure import (
    Arm,
    Divergence,
    RuntimeStudent,
    Student,
    TorchStudent,
    diverge,
    gap_closed,
    require_effect,
    torch_answers,
    with_prompt,
    without_prompt,
)
from ..progress import bar
from ..rollout import Dialogue, dialogues_for
from ..source import Source
from . import compare, costs, locality, running
from .figures import (
    CACHED_PREFIX,
    NO_PROMPT,
    PATCH,
    PROMPT,
    VARIANTS,
    Answer,
    Baseline,
    Composed,
    Fits,
    Layer,
    PatchReport,
    Point,
    Strength,
    Sweep,
    Variant,
)
from .frontier import measure_frontier

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
# Strengths and layers take many passes, so they are measured on a few held-out answers, and layers only on the first
# tokens of these answers.
_SUBSET, _SUBSET_TOKENS = 4, 32
_LONG, _DIALOGUES = 4, 4
_SHOWN, _WORST = 3, 3
_TIMED = 8


@dataclass(frozen=True)
class Subject:
    """One patch to report on, with the prompt that it replaces and the queries that it is measured on.

    Attributes:
        patch: the patch.
        file: the file that the patch was loaded from.
        context: the prompt that the patch replaces.
        queries: the held-out queries.
        fitted: the calibration queries; empty if they are not known.
    """

    patch: Patch
    file: Path
    context: str
    queries: list[str]
    fitted: list[str]


@dataclass(frozen=True)
class Setup:
    """The models and sizes that every figure is measured with.

    Attributes:
        source: the base model.
        model: the same model, loaded with transformers.
        graph: the exported graph in a session; None if everything runs in torch.
        max_new_tokens: the largest number of tokens of the prompted model's answers, on which KL is measured.
        long: the largest number of tokens of the long completions; 0 leaves them out.
        methods: the methods to fit for comparison.
        frontier: the numbers of KV entries for the plot of fidelity against bytes; empty leaves the plot out.
    """

    source: Source
    model: Any
    graph: Graph | None
    max_new_tokens: int
    long: int
    methods: tuple[str, ...]
    frontier: tuple[int, ...] = ()


def check_long(setup: Setup, subject: Subject) -> None:
    """Check that the long completions fit the context window, before the minutes of work.

    Raises:
        RequestError: prompt, query and completion are longer than the context window.
    """
    longest = max(len(setup.source.codec.render(query, subject.context)) for query in subject.queries[:_LONG])
    window = setup.model.config.max_position_embeddings
    if longest + setup.long > window:
        raise RequestError(
            "a long completion does not fit the context window",
            field="--long",
            got=f"{longest + setup.long} tokens with the prompt",
            wanted=f"at most {window}",
            fix="pass a smaller --long, or 0 to leave it out",
        )


def measure_patch(setup: Setup, subject: Subject) -> PatchReport:
    """Measure every figure that is reported on one patch.

    Raises:
        CalibrationError: there are no queries, every completion is empty, or the prompt has no effect.
        RequestError: a query does not fit the context window.
    """
    source, model, patch = setup.source, setup.model, subject.patch
    held = dialogues_for(source, model, subject.context, subject.queries, setup.max_new_tokens)
    variants, base, own = _variants(setup, subject, held)
    long = running.measure_long(source, model, patch, held[:_LONG], setup.long) if setup.long else None
    openings, follow_ups = subject.queries[:_DIALOGUES], locality.built_in("follow-ups")
    turns = running.measure_turns(source, model, subject.context, patch, openings, follow_ups, setup.max_new_tokens)
    some = held[:_SUBSET]
    short = [replace(d, completion=d.completion[:_SUBSET_TOKENS]) for d in some]
    fits, retained = _fits(setup, subject, held, base.mean)
    shown, worst = _answers(setup, subject, held, own)
    return PatchReport(
        name=patch.name,
        identity=patch.identity,
        method=patch.config.method,
        rank=patch.rank,
        sites=sorted({site for _, site in patch.deltas}),
        file=subject.file.name,
        file_bytes=subject.file.stat().st_size,
        created=patch.config.created,
        prompt=subject.context,
        prompt_tokens=len(source.codec.render(subject.context, raw=True)),
        added_tokens=len(held[0].teacher_prompt) - len(held[0].student_prompt),
        queries=len(held),
        completion_tokens=sum(len(d.completion) for d in held),
        variants=variants,
        positions=running.curve(base, own, max(1, setup.max_new_tokens // 24)),
        layers=layer_effects(model, patch, short, retained),
        sweep=sweep(setup, subject, some),
        frontier=_frontier(setup, subject, held),
        long=long,
        turns=turns,
        fits=fits,
        answers=shown,
        worst=worst,
    )


def _variants(setup: Setup, subject: Subject, held: list[Dialogue]) -> tuple[list[Variant], Divergence, Divergence]:
    """Return the four rows, the unpatched divergence and the patched divergence."""
    source, model, graph, patch = setup.source, setup.model, setup.graph, subject.patch
    shared = costs.shared_prefix([d.teacher_prompt for d in held])
    torch_base, torch_patched = TorchStudent(model), TorchStudent(model, patch)
    prompted = with_prompt(torch_base)
    base: Student = torch_base
    own: Student = torch_patched
    cached: Arm = prompted  # in torch a cached prefix is the same computation as the prompt
    if graph is not None:
        base, own = RuntimeStudent(graph), RuntimeStudent(graph, patch)
        cached = costs.CachedPrefixArm(graph, held[0].teacher_prompt[:shared])
    arms = dict(zip(VARIANTS, (without_prompt(base), with_prompt(base), cached, without_prompt(own)), strict=True))
    with bar("held-out fidelity", len(held), "query") as progress:
        found = diverge(held, prompted, arms, progress.update)
    unpatched = found[NO_PROMPT].mean
    require_effect(unpatched)
    elsewhere = {PROMPT: prompted, PATCH: without_prompt(torch_patched)}
    reference = without_prompt(torch_base)
    passages = locality.plain_text(source, subject.context, locality.built_in("neutral-passages"))
    neutral = locality.built_in("neutral-questions")
    unrelated = locality.base_answers(source, model, subject.context, neutral, setup.max_new_tokens)
    with bar("locality", len(passages) + len(unrelated), "text") as progress:
        replaces = () if patch.prefix is None else patch.prefix.replaces
        after_prefix = {**elsewhere, PATCH: without_prompt(locality.BehindPrefix(torch_patched, replaces))}
        text = diverge(passages, reference, after_prefix, progress.update)
        asked = diverge(unrelated, reference, elsewhere, progress.update)
    times = {} if graph is None else costs.time_variants(graph, patch, held[:_TIMED])
    per_token = costs.kv_token_bytes(graph, model)
    session = {PROMPT: (len(held[0].teacher_prompt) - len(held[0].student_prompt)) * per_token}
    if patch.prefix is not None:  # every session holds the entries instead of the ids that they replace
        entries = sum(patch.prefix.counts) / patch.prefix.layers
        session[PATCH] = round((entries - len(patch.prefix.replaces)) * per_token)
    variants = []
    for name in VARIANTS:
        kind = name.partition(",")[0]
        variants.append(
            Variant(
                name,
                found[name].mean,
                gap_closed(unpatched, found[name].mean),
                found[name].top1,
                text[kind].mean if kind in text else 0.0,
                asked[kind].mean if kind in asked else 0.0,
                times[name].first_token_ms if name in times else None,
                times[name].token_ms if name in times else None,
                session.get(kind, 0),
                {CACHED_PREFIX: shared * per_token, PATCH: subject.file.stat().st_size}.get(name, 0),
            )
        )
    return variants, found[NO_PROMPT], found[PATCH]


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
        found = diverge(dialogues, with_prompt(TorchStudent(model)), arms, progress.update)
    gap, own = found["none"].mean, found["all"].mean
    return [Layer(i, retained.get(i, {}), found[str(i)].mean, (found[str(i)].mean - own) / gap) for i in layers]


def sweep(setup: Setup, subject: Subject, dialogues: Sequence[Dialogue]) -> Sweep | None:
    """Measure the patch at strengths from -1 to 2.

    Returns:
        The KL on the prompted model's answers and the free-running text at each strength. None for a patch with a KV
        prefix, since such a patch cannot be scaled.
    """
    source, model, patch = setup.source, setup.model, subject.patch
    if patch.prefix is not None:
        return None
    scaled = {strength: strength * patch for strength in STRENGTHS}
    arms = {str(s): without_prompt(TorchStudent(model, under)) for s, under in scaled.items()}
    with bar("strengths", len(dialogues), "query") as progress:
        found = diverge(dialogues, with_prompt(TorchStudent(model)), arms, progress.update)
    prompts = [d.student_prompt for d in dialogues]
    write = partial(torch_answers, source, model, max_new_tokens=setup.max_new_tokens)
    written = {s: write(under)(prompts, f"strength {s:g}") for s, under in scaled.items()}
    return Sweep(
        query=subject.queries[0],
        prompted_answer=source.codec.decode(dialogues[0].completion).strip(),
        prompted_distinct=running.distinct([d.completion for d in dialogues]),
        strengths=[
            Strength(s, found[str(s)].mean, running.distinct(written[s]), source.codec.decode(written[s][0]).strip())
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
    write = partial(torch_answers, setup.source, setup.model, max_new_tokens=setup.max_new_tokens)
    plain, patched = (
        write(patch)(prompts, f"answers, {variant}") for variant, patch in ((NO_PROMPT, None), (PATCH, subject.patch))
    )
    text = [
        Answer(subject.queries[i], kl[i], *(setup.source.codec.decode(c).strip() for c in (p, held[i].completion, q)))
        for i, p, q in zip(first + worst, plain, patched, strict=True)
    ]
    return text[: len(first)], text[len(first) :]


def _fits(
    setup: Setup, subject: Subject, held: list[Dialogue], unpatched: float
) -> tuple[Fits, dict[int, dict[str, float]]]:
    """Return the compared methods, and layer -> site -> the share of energy that the patch's own fit keeps."""
    if not setup.methods:
        return Fits(0, 0, False, [], "left out with --baselines none"), {}
    if not subject.fitted:
        why = "the queries that this patch was fitted on are not among those given (--calibration FILE)"
        return Fits(0, 0, False, [], why), {}
    model, patch = setup.model, subject.patch
    calibration = _calibration(setup, subject)
    fits = {method: compare.fit_method(model, calibration, method, patch) for method in setup.methods}
    arms = {m: without_prompt(TorchStudent(model, fit.patch)) for m, fit in fits.items() if fit is not None}
    with bar("methods on held-out queries", len(held), "query") as progress:
        found = diverge(held, with_prompt(TorchStudent(model)), arms, progress.update)
    methods = []
    for method, fit in fits.items():
        if fit is None:
            methods.append(Baseline(method, "no setting gives finite tensors", None, None, 0, 0.0))
        else:
            kl = found[method].mean
            gap, size = gap_closed(unpatched, kl), fit.patch.nbytes
            methods.append(Baseline(method, fit.setting, kl, gap, size, fit.seconds))
    same = fits.get(patch.config.method)
    exact = same is not None and compare.same_tensors(same.patch, patch)
    rows = sum(len(d.completion) for d in calibration)
    return Fits(len(subject.fitted), rows, exact, methods), same.retained if same is not None and exact else {}


def _calibration(setup: Setup, subject: Subject) -> list[Dialogue]:
    """Generate again the dialogues that the patch was fitted on."""
    made = subject.patch.config.calibration or {}
    limit, samples = int(made.get("max_new_tokens", setup.max_new_tokens)), int(made.get("samples", 1))
    return dialogues_for(setup.source, setup.model, subject.context, subject.fitted, limit, samples=samples)


def _frontier(setup: Setup, subject: Subject, held: list[Dialogue]) -> list[Point]:
    if not setup.frontier or not subject.fitted:
        return []
    return measure_frontier(setup.model, _calibration(setup, subject), held, subject.patch, setup.frontier)


def measure_composition(setup: Setup, subjects: Sequence[Subject]) -> list[Composed]:
    """Measure how well the sum of all patches works on each patch's own held-out queries, against its own prompt."""
    source, model = setup.source, setup.model
    results = []
    for subject in subjects:
        others = reduce(add, (s.patch for s in subjects if s is not subject))
        everything = subject.patch + others
        held = dialogues_for(source, model, subject.context, subject.queries, setup.max_new_tokens)
        under = {"none": None, "alone": subject.patch, "others": others, "together": everything}
        arms = {name: without_prompt(TorchStudent(model, patch)) for name, patch in under.items()}
        with bar(f"composition, {subject.patch.name}", len(held), "query") as progress:
            found = diverge(held, with_prompt(TorchStudent(model)), arms, progress.update)
        gaps = {name: gap_closed(found["none"].mean, found[name].mean) for name in ("alone", "others", "together")}
        prompt = [held[0].student_prompt]
        texts = [
            source.codec.decode(torch_answers(source, model, p, setup.max_new_tokens)(prompt, label)[0]).strip()
            for p, label in ((subject.patch, "answer of the patch"), (everything, "answer of the sum"))
        ]
        results.append(
            Composed(subject.patch.name, gaps["alone"], gaps["others"], gaps["together"], subject.queries[0], *texts)
        )
    return results

"""From patches and their prompts to the figures of a report. Draws nothing, prints nothing but progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError, RequestError
from tp_runtime.patch import Patch
from tp_runtime.session import Graph

from ..measure import Arm, Divergence, diverge, runtime_student, torch_student, with_prompt, without_prompt
from ..progress import bar
from ..rollout import Dialogue, dialogues_for
from ..source import Source
from . import compare, costs, locality, running
from .figures import Answer, Baseline, Composed, Fits, Layer, PatchReport, Point, Strength, Sweep, Variant
from .frontier import measure_frontier
from .running import gap_closed

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
# What takes many passes, strengths and layers, is measured on few held-out answers; layers on their beginnings.
_SUBSET, _SUBSET_TOKENS = 4, 32
_LONG, _DIALOGUES = 4, 4
_SHOWN, _WORST = 3, 3
_TIMED = 8


@dataclass(frozen=True)
class Subject:
    """One patch to report on, with what it stands for and what it is measured on.

    Attributes:
        patch, file: the patch and where it came from.
        context: the prompt it absorbed.
        queries: held out.
        fitted: the calibration queries, as far as they are known.
    """

    patch: Patch
    file: Path
    context: str
    queries: list[str]
    fitted: list[str]


@dataclass(frozen=True)
class Setup:
    """What everything is measured with: the source, the loaded model, a graph or none, and the sizes.

    Attributes:
        max_new_tokens: of the prompted model's answers that KL is measured on.
        long: tokens of the long completions; 0 leaves them out.
        methods: to fit beside the patch.
        frontier: numbers of KV entries to draw fidelity against bytes with; none leave it out.
    """

    source: Source
    model: Any
    graph: Graph | None
    max_new_tokens: int
    long: int
    methods: tuple[str, ...]
    frontier: tuple[int, ...] = ()


def check_long(setup: Setup, subject: Subject) -> None:
    """Find before the minutes of work that the long completions do not fit.

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
    """Everything that is reported of one patch.

    Raises:
        CalibrationError: no queries, empty completions, or a prompt without effect.
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
    """The four rows, and the unpatched and the patched divergence by token."""
    source, model, graph, patch = setup.source, setup.model, setup.graph, subject.patch
    shared = costs.shared_prefix([d.teacher_prompt for d in held])
    torch_base, prompted = torch_student(model), with_prompt(torch_student(model))
    if graph is None:
        base, own = torch_base, torch_student(model, patch)
        cached: Arm = prompted  # torch keeps no prefix here: the same computation
    else:
        base, own = runtime_student(graph), runtime_student(graph, patch)
        cached = costs.cached_prefix_arm(graph, held[0].teacher_prompt[:shared])
    names = ("no prompt", "prompt", "prompt, cached prefix", "patch")
    arms = dict(zip(names, (without_prompt(base), with_prompt(base), cached, without_prompt(own)), strict=True))
    with bar("held-out fidelity", len(held), "query") as progress:
        found = diverge(held, prompted, arms, progress.update)
    unpatched = found["no prompt"].mean
    if unpatched < 1e-7:
        raise CalibrationError(
            "the prompt has no effect on these queries",
            field="prompt",
            got=f"KL {unpatched:.2g} without a patch",
            wanted="a difference to close",
            fix="use the prompt that the patch was made of, or other queries",
        )
    elsewhere = {"prompt": with_prompt(torch_base), "patch": without_prompt(torch_student(model, patch))}
    reference = without_prompt(torch_base)
    passages = locality.plain_text(source, subject.context, locality.built_in("neutral-passages"))
    neutral = locality.built_in("neutral-questions")
    unrelated = locality.base_answers(source, model, subject.context, neutral, setup.max_new_tokens)
    with bar("locality", len(passages) + len(unrelated), "text") as progress:
        behind = {**elsewhere, "patch": without_prompt(locality.behind_prefix(torch_student(model, patch), patch))}
        text = diverge(passages, reference, behind, progress.update)
        asked = diverge(unrelated, reference, elsewhere, progress.update)
    times = {} if graph is None else costs.time_variants(graph, patch, held[:_TIMED])
    per_token = costs.kv_token_bytes(graph, model)
    session = {"prompt": (len(held[0].teacher_prompt) - len(held[0].student_prompt)) * per_token}
    if patch.prefix is not None:  # every session holds the entries, and not the ids they stand in for
        session["patch"] = (len(patch.prefix) - len(patch.prefix.replaces)) * per_token
    variants = []
    for name in names:
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
                {"prompt, cached prefix": shared * per_token, "patch": subject.file.stat().st_size}.get(name, 0),
            )
        )
    return variants, found["no prompt"], found["patch"]


def layer_effects(
    model: Any, patch: Patch, dialogues: Sequence[Dialogue], retained: dict[int, dict[str, float]]
) -> list[Layer]:
    """KL with each layer's delta alone switched off: what the patch loses there, the others left as they are."""
    layers = sorted({layer for layer, _ in patch.deltas})
    arms = {
        "none": without_prompt(torch_student(model)),
        "all": without_prompt(torch_student(model, patch)),
        **{str(i): without_prompt(torch_student(model, without_layer(patch, i))) for i in layers},
    }
    with bar("layers switched off", len(dialogues), "query") as progress:
        found = diverge(dialogues, with_prompt(torch_student(model)), arms, progress.update)
    gap, own = found["none"].mean, found["all"].mean
    return [Layer(i, retained.get(i, {}), found[str(i)].mean, (found[str(i)].mean - own) / gap) for i in layers]


def without_layer(patch: Patch, layer: int) -> Patch:
    """The patch with every slot of one layer left out."""
    kept = {slot: delta for slot, delta in patch.deltas.items() if slot[0] != layer}
    return Patch(kept, replace(patch.config, probe=None, fidelity=None, report=None), patch.prefix)


def sweep(setup: Setup, subject: Subject, dialogues: Sequence[Dialogue]) -> Sweep | None:
    """The patch at strengths from -1 to 2: KL on the prompted answers, and what it writes by itself.

    None for a patch with a KV prefix, which has no strengths.
    """
    source, model, patch = setup.source, setup.model, subject.patch
    if patch.prefix is not None:
        return None
    scaled = {strength: strength * patch for strength in STRENGTHS}
    arms = {str(s): without_prompt(torch_student(model, under)) for s, under in scaled.items()}
    with bar("strengths", len(dialogues), "query") as progress:
        found = diverge(dialogues, with_prompt(torch_student(model)), arms, progress.update)
    prompts = [d.student_prompt for d in dialogues]
    write = partial(running.answers, source, model, limit=setup.max_new_tokens)
    written = {s: write(under, prompts, label=f"strength {s:g}") for s, under in scaled.items()}
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
    """The first few held-out queries, and the worst others by the patch's KL."""
    kl = own.by_dialogue()
    first = list(range(len(held)))[:_SHOWN]
    worst = sorted(range(len(first), len(held)), key=lambda i: -kl[i])[:_WORST]
    prompts = [held[i].student_prompt for i in first + worst]
    write = partial(running.answers, setup.source, setup.model, prompts=prompts, limit=setup.max_new_tokens)
    plain, patched = write(patch=None, label="answers, no prompt"), write(patch=subject.patch, label="answers, patch")
    text = [
        Answer(subject.queries[i], kl[i], *(setup.source.codec.decode(c).strip() for c in (p, held[i].completion, q)))
        for i, p, q in zip(first + worst, plain, patched, strict=True)
    ]
    return text[: len(first)], text[len(first) :]


def _fits(
    setup: Setup, subject: Subject, held: list[Dialogue], unpatched: float
) -> tuple[Fits, dict[int, dict[str, float]]]:
    """The methods beside each other; and the energy that the patch's own fit keeps, layer -> site -> share."""
    if not setup.methods:
        return Fits(0, 0, False, [], "left out with --baselines none"), {}
    if not subject.fitted:
        why = "the queries this patch was fitted on are not among those given (--calibration FILE)"
        return Fits(0, 0, False, [], why), {}
    model, patch = setup.model, subject.patch
    calibration = _calibration(setup, subject)
    fits = {method: compare.fit_method(model, calibration, method, patch) for method in setup.methods}
    arms = {m: without_prompt(torch_student(model, fit.patch)) for m, fit in fits.items() if fit is not None}
    with bar("methods on held-out queries", len(held), "query") as progress:
        found = diverge(held, with_prompt(torch_student(model)), arms, progress.update)
    methods = []
    for method, fit in fits.items():
        if fit is None:
            methods.append(Baseline(method, "no setting stays finite", None, None, 0, 0.0))
        else:
            kl = found[method].mean
            gap, size = gap_closed(unpatched, kl), fit.patch.nbytes // 2
            methods.append(Baseline(method, fit.setting, kl, gap, size, fit.seconds))
    same = fits.get(patch.config.method)
    exact = same is not None and compare.same_tensors(same.patch, patch)
    rows = sum(len(d.completion) for d in calibration)
    return Fits(len(subject.fitted), rows, exact, methods), same.retained if same is not None and exact else {}


def _calibration(setup: Setup, subject: Subject) -> list[Dialogue]:
    """The dialogues that the patch was fitted on, made again."""
    made = subject.patch.config.calibration or {}
    limit, samples = int(made.get("max_new_tokens", setup.max_new_tokens)), int(made.get("samples", 1))
    return dialogues_for(setup.source, setup.model, subject.context, subject.fitted, limit, samples=samples)


def _frontier(setup: Setup, subject: Subject, held: list[Dialogue]) -> list[Point]:
    if not setup.frontier or not subject.fitted:
        return []
    return measure_frontier(setup.model, _calibration(setup, subject), held, subject.patch, setup.frontier)


def measure_composition(setup: Setup, subjects: Sequence[Subject]) -> list[Composed]:
    """What the sum of all patches keeps of each one, on that one's own held-out queries and prompt."""
    source, model = setup.source, setup.model
    results = []
    for subject in subjects:
        others = reduce(add, (s.patch for s in subjects if s is not subject))
        everything = subject.patch + others
        held = dialogues_for(source, model, subject.context, subject.queries, setup.max_new_tokens)
        under = {"none": None, "alone": subject.patch, "others": others, "together": everything}
        arms = {name: without_prompt(torch_student(model, patch)) for name, patch in under.items()}
        with bar(f"composition, {subject.patch.name}", len(held), "query") as progress:
            found = diverge(held, with_prompt(torch_student(model)), arms, progress.update)
        gaps = {name: gap_closed(found["none"].mean, found[name].mean) for name in ("alone", "others", "together")}
        prompt = [held[0].student_prompt]
        texts = [
            source.codec.decode(running.answers(source, model, p, prompt, setup.max_new_tokens, label)[0]).strip()
            for p, label in ((subject.patch, "alone"), (everything, "together"))
        ]
        results.append(
            Composed(subject.patch.name, gaps["alone"], gaps["others"], gaps["together"], subject.queries[0], *texts)
        )
    return results

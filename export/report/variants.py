"""The four variants that a report compares: no prompt, prompt, prompt with a cached prefix, and patch."""

from __future__ import annotations

from collections.abc import Sequence

from ..measure import (
    Arm,
    Divergence,
    RuntimeStudent,
    Student,
    TorchStudent,
    cached_teacher,
    diverge,
    require_effect,
    with_prompt,
    without_prompt,
)
from ..progress import bar
from ..rollout import Dialogue
from . import costs, locality
from .figures import CACHED_PREFIX, NO_PROMPT, PATCH, PROMPT, VARIANTS, Variant
from .known import Known
from .setup import Setup, Subject

_TIMED = 8


def measure_variants(
    setup: Setup, subject: Subject, held: Sequence[Dialogue], known: Known
) -> tuple[list[Variant], Divergence, Divergence]:
    """Return the four rows, the unpatched divergence and the patched divergence.

    Raises:
        CalibrationError: the prompt has no effect.
    """
    model, graph, patch = setup.model, setup.graph, subject.patch
    shared = costs.shared_prefix([d.teacher_prompt for d in held])
    torch_base, torch_patched = TorchStudent(model), TorchStudent(model, patch)
    prompted = with_prompt(cached_teacher(model, held))
    base: Student = torch_base
    own: Student = torch_patched
    cached: Arm = prompted  # in torch a cached prefix is the same computation as the prompt
    if graph is not None:
        base, own = RuntimeStudent(graph), RuntimeStudent(graph, patch)
        cached = costs.CachedPrefixArm(graph, held[0].teacher_prompt[:shared])
    arms = dict(zip(VARIANTS, (without_prompt(base), with_prompt(base), cached, without_prompt(own)), strict=True))
    with bar("held-out fidelity", len(held), "query") as progress:
        found = diverge(held, prompted, arms, progress.update)
    require_effect(found[NO_PROMPT])
    answers = {NO_PROMPT: setup.in_runtime(subject, None), PATCH: setup.in_runtime(subject, patch)}
    text_kl, question_kl = _elsewhere(setup, subject, torch_patched)
    times = {} if graph is None else costs.time_variants(graph, patch, held[:_TIMED])
    per_token = costs.kv_token_bytes(graph, model)
    session = {PROMPT: (len(held[0].teacher_prompt) - len(held[0].student_prompt)) * per_token}
    if patch.prefix is not None:  # every session holds the entries instead of the ids that they replace
        session[PATCH] = round(costs.entry_tokens(patch.prefix) * per_token)
    once = {CACHED_PREFIX: shared * per_token, PATCH: subject.file.stat().st_size}
    variants = []
    for name in VARIANTS:
        kind = name.partition(",")[0]
        variants.append(
            Variant(
                name,
                known.compare(found[NO_PROMPT], found[name], answers.get(name), f"known answers, {name}"),
                text_kl.get(kind, 0.0),
                question_kl.get(kind, 0.0),
                times[name].first_token_ms if name in times else None,
                times[name].token_ms if name in times else None,
                session.get(kind, 0),
                once.get(name, 0),
            )
        )
    return variants, found[NO_PROMPT], found[PATCH]


def _elsewhere(setup: Setup, subject: Subject, student: TorchStudent) -> tuple[dict[str, float], dict[str, float]]:
    """Return the KL of the prompt and of the patch on unrelated text and on unrelated questions, by variant."""
    source, model, patch = setup.source, setup.model, subject.patch
    base = TorchStudent(model)
    arms = {PROMPT: with_prompt(base), PATCH: without_prompt(student)}
    passages = locality.plain_text(source, subject.context, locality.built_in("neutral-passages"))
    neutral = locality.built_in("neutral-questions")
    asked = locality.base_answers(model, setup.asked(subject), neutral, setup.max_new_tokens)
    replaces = () if patch.prefix is None else patch.prefix.replaces
    after_prefix = {**arms, PATCH: without_prompt(locality.BehindPrefix(student, replaces))}
    with bar("locality", len(passages) + len(asked), "text") as progress:
        text = diverge(passages, without_prompt(base), after_prefix, progress.update)
        questions = diverge(asked, without_prompt(base), arms, progress.update)
    return {name: text[name].mean for name in arms}, {name: questions[name].mean for name in arms}

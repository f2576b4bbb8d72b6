"""This module makes a patch from a prompt: rollouts, the choice of a form, the fit, held-out figures and the probe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import FLOAT_PRECISIONS, Delta, Patch, PatchConfig, SlotKey, context_digest

from ..decoder import TorchDelta, TorchPrefix, blocks_of, kv_shape, layer_deltas, layer_windows, torch_prefix
from ..measure import (
    Fidelity,
    TorchStudent,
    measure_accuracy,
    measure_fidelity,
    recorded_answers,
    torch_answers,
    torch_probe,
)
from ..progress import bar
from ..quantise import QuantisedStudent, as_student
from ..queries import SystemMessages, check_disjoint, query_digest
from ..rollout import Context, Dialogue, Prompting, PromptPair, RolloutStore, check_beginning, check_text, dialogues_for
from ..source import Source
from .calibration import Calibration, restate
from .choice import Target, Trial, choose, most_entries, selection_size
from .closed_form import check_entries, entry_bytes, fit_patch
from .forms import check_method
from .recipe import Recipe
from .refine import refine_deltas
from .student import student_for

_MEASURED_BYTES = 4_096  # of the description: the figures and the probe, which are added after the fit


def make_patch(
    source: Source,
    model: Any,
    context: str | None,
    fitted: Sequence[str],
    held_out: Sequence[str],
    recipe: Recipe,
    *,
    name: str,
    target: Target | None = None,
    answers: Mapping[str, str] | None = None,
    store_context: bool = False,
    store: RolloutStore | None = None,
    systems: SystemMessages | None = None,
    student: QuantisedStudent | None = None,
) -> Patch:
    """Compute a patch that stands in for `context`.

    Args:
        source: the base model.
        model: the same base model, loaded.
        context: the system prompt or context to absorb. If it is None, the patch only repairs
            `recipe.student_precision`.
        fitted: the calibration queries.
        held_out: the queries kept for measuring. The figures in the patch come only from these.
        recipe: the settings of the fit.
        name: the name of the patch.
        target: what the file has to reach, by which method, rank, number of entries and dtype are chosen; None takes
            those of the recipe.
        answers: the expected answers to held-out queries, by query; with them the file also states how many right
            answers the patch keeps.
        store_context: whether to put the text itself into the patch's description.
        store: the store of the teacher's answers, which lets an interrupted run go on.
        systems: system messages that the queries have of their own; the context then stands in front of them. None if
            queries have none, so that the context stands in place of one.
        student: the weights of `recipe.student_precision`, such as those of an exported folder; None quantises the
            model anew.

    Returns:
        The patch, rounded to what its file will hold. If it was refined, its figures also contain what the closed form
        reached on its own (`gap_closed_closed_form`).

    Raises:
        CalibrationError: `dialogues_for`, `check_beginning`, `choose` or `measure_fidelity` raises it, a held-out query
            is also fitted, the form does not apply to the model, or the recipe does not fit the model or the context.
        PatchValueError: a tensor does not fit the dtype of the recipe.
    """
    asked = Prompting(source.codec, context, () if systems is None else systems.fitted)
    asked_held_out = Prompting(source.codec, context, () if systems is None else systems.held_out)
    prompts = [*asked.pairs(fitted), *asked_held_out.pairs(held_out)]
    _check(source, model, context, recipe, target, prompts)
    check_disjoint(fitted, held_out)
    if student is None:
        student = student_for(source, model, recipe.student_precision)
    prepared = None if context is None else Context.of(model, asked, prompts)
    cached = None if prepared is None else prepared.cached
    limit, stop = recipe.max_new_tokens, recipe.stop
    dialogues = dialogues_for(
        model, asked, fitted, limit, samples=recipe.samples, stop=stop, cached=cached, store=store
    )
    evaluation = (
        dialogues_for(model, asked_held_out, held_out, limit, stop=stop, cached=cached, store=store) if held_out else []
    )
    again = restate(prepared) if prepared is not None and recipe.restate else []
    config = PatchConfig(
        name=name,
        method=recipe.method,
        base_model=source.name,
        base_digest=source.digest,
        architecture=source.architecture,
        precision="fp32" if student is None else student.precision,
        context_digest="" if context is None else context_digest(context),
        context=context if store_context else None,
        calibration={
            "queries": len(fitted),
            "samples": recipe.samples,
            "rows": sum(len(dialogue.completion) for dialogue in [*dialogues, *again]),
            "max_new_tokens": limit,
            "holdout": len(evaluation),
            "query_digests": sorted(query_digest(query) for query in fitted),
        },
        licence=source.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        stop=stop,
        weights_digest=None if student is None else student.weights_digest,
    )
    held = _HeldOut(model, student, cached)
    most_bytes = None if target is None else target.max_bytes
    if target is not None and prepared is not None:
        length = prepared.entries().position
        described = len(json.dumps(config.to_dict())) + _MEASURED_BYTES
        size_of = partial(entry_bytes, model.config, layer_windows(model), length, described)
        if target.gap is None:
            recipe, target = most_entries(recipe, length, size_of, target), None
    if target is not None:
        assert prepared is not None
        rest, kept = _split(dialogues, len(fitted), selection_size(fitted))
        rows = Calibration(prepared, rest, again)

        def trial(candidate: Recipe) -> Trial:
            made = _fitted(model, rows, candidate, config, student)
            return Trial(candidate, made, held.figures(made, kept, "selection").gap_closed)

        recipe = choose(recipe, target, length, size_of, trial).recipe
    # Also after a search: the queries that its candidates were measured on are worth their rows.
    patch = _fitted(model, Calibration(prepared, dialogues, again), recipe, config, student)
    figures = held.figures(patch, evaluation, "held-out fidelity").to_dict() if evaluation else {}
    if recipe.refine_steps and patch.deltas:
        before = figures
        patch = _refined(model, dialogues, patch, recipe, student)
        if evaluation:
            figures = {
                "gap_closed_closed_form": before["gap_closed"],
                **held.figures(patch, evaluation, "held-out fidelity").to_dict(),
            }
    known = {query: answers[query] for query in held_out if query in answers} if answers else {}
    if known and context is not None:
        with as_student(student):
            unpatched, patched = (torch_answers(source, model, under, limit, stop) for under in (None, patch))
            prompted = recorded_answers(evaluation)
            accuracy = measure_accuracy(asked_held_out, known, prompted, unpatched, patched, stop)
        figures |= accuracy.to_dict()
    with as_student(student):
        probe = torch_probe(model, patch, (evaluation or dialogues)[0].student())
    patch = replace(patch, config=replace(patch.config, fidelity=figures or None, probe=probe))
    if most_bytes is not None and patch.nbytes > most_bytes:
        raise CalibrationError(
            "the file has more bytes than its estimate said",
            field="--max-bytes",
            got=f"{patch.nbytes} bytes",
            wanted=f"at most {most_bytes}",
            fix=f"pass --max-bytes {2 * most_bytes - patch.nbytes}",
        )
    return patch


def _check(
    source: Source,
    model: Any,
    context: str | None,
    recipe: Recipe,
    target: Target | None,
    prompts: Sequence[PromptPair],
) -> None:
    """Check a recipe against the model and the context, before the rollout, which takes minutes."""
    layers = model.config.num_hidden_layers
    if not 0 <= recipe.settings.first_layer < layers:
        raise CalibrationError(
            "the model has no such block",
            field="first_layer",
            got=recipe.settings.first_layer,
            wanted=f"0..{layers - 1}",
        )
    check_method(recipe.method, blocks_of(model))
    if context is None and recipe.student_precision in FLOAT_PRECISIONS:
        raise CalibrationError(
            "there is neither a prompt to absorb nor a precision to repair",
            field="prompt",
            got="none",
            wanted="text, or --student-precision int4 or int8",
        )
    if context is not None:
        check_text(context)
    if recipe.prefix or target is not None:
        if context is None:
            raise CalibrationError(
                "there is no prompt to take key/value entries from", field="prefix", got=recipe.prefix, wanted="0"
            )
        check_entries(recipe.prefix, len(check_beginning(source.codec, prompts).teacher))
        head_dim = kv_shape(model.config)[1]
        if head_dim % 2 and "i4" in ((recipe.dtype,) if target is None else target.dtypes):
            raise CalibrationError(
                "entries of four bits share bytes in pairs, and the model's head dim is odd",
                field="--dtype",
                got=head_dim,
                wanted="an even head dim",
                fix="pass --dtype i8",
            )


def _fitted(
    model: Any, rows: Calibration, recipe: Recipe, config: PatchConfig, student: QuantisedStudent | None
) -> Patch:
    """Fit a recipe and return the patch as it will be stored."""
    deltas, prefix = fit_patch(model, rows, recipe, student)
    ridge = recipe.settings.ridge if any(deltas.values()) else None
    return assemble(deltas, prefix, replace(config, method=recipe.method, ridge=ridge), recipe.dtype)


def assemble(
    deltas: Mapping[int, Mapping[str, TorchDelta]], prefix: TorchPrefix | None, config: PatchConfig, dtype: str
) -> Patch:
    """Return the patch of fitted tensors, rounded to what a file of that dtype holds, so that figures describe it."""

    def array(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.float().cpu().numpy()

    arrays: dict[SlotKey, Delta] = {
        (layer, site): Delta(array(delta.a), array(delta.b), array(delta.bias), array(delta.mean))
        for layer, sites in deltas.items()
        for site, delta in sites.items()
    }
    return Patch(arrays, config, None if prefix is None else prefix.numpy()).rounded(dtype)


def _split(dialogues: Sequence[Dialogue], queries: int, kept: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """Split the rounds of answers to `queries` queries: those to fit on, and the greedy ones of the last `kept`."""
    rest = [dialogue for i, dialogue in enumerate(dialogues) if i % queries < queries - kept]
    return rest, list(dialogues[queries - kept : queries])


def _refined(
    model: Any, dialogues: Sequence[Dialogue], patch: Patch, recipe: Recipe, student: QuantisedStudent | None
) -> Patch:
    """Improve the weights of a patch by gradient steps; its entries stay."""
    with bar("refine", recipe.refine_steps, "step") as shown:
        deltas = refine_deltas(
            model,
            dialogues,
            layer_deltas(patch, model),
            recipe.refine_steps,
            prefix=torch_prefix(patch, model),
            student=student,
            progress=lambda _loss: shown.update(),
        )
    # Weights alone may have another dtype than the entries that come back beside them.
    return replace(assemble(deltas, None, patch.config, recipe.dtype), prefix=patch.prefix, dtype=patch.dtype)


class _HeldOut:
    """Measures patches on dialogues that they were not fitted on.

    Args:
        model: the loaded model.
        student: the weights that the student has, if they are not the teacher's.
        cached: the context's cached keys and values.
    """

    def __init__(self, model: Any, student: QuantisedStudent | None, cached: TorchPrefix | None) -> None:
        self._model, self._student, self._cached = model, student, cached

    def figures(self, patch: Patch, dialogues: Sequence[Dialogue], label: str) -> Fidelity:
        """Return the figures of a patch."""
        with bar(label, len(dialogues), "query") as shown:
            return measure_fidelity(
                dialogues,
                TorchStudent(self._model, cached=self._cached),
                TorchStudent(self._model, weights=self._student),
                TorchStudent(self._model, patch, self._student),
                progress=shown.update,
            )

"""This module makes a patch from a prompt: rollouts, the lock-step fit, held-out figures and the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import FLOAT_PRECISIONS, Delta, Patch, PatchConfig, SlotKey

from ..compaction import Ridges, split_budget
from ..decoder import Entry, TorchDelta, TorchPrefix, blocks_of, layer_windows
from ..measure import TorchStudent, measure_fidelity, torch_probe
from ..progress import bar
from ..quantise import QuantisedStudent, as_student, student_of
from ..queries import check_disjoint, query_digest
from ..rollout import Dialogue, RolloutStore, context_digest
from ..source import Source
from .calibration import Calibration, Context, check_beginning, dialogues_with, restate
from .entries import Compaction
from .forms import Settings, check_method
from .lockstep import Behind, fit_lockstep
from .refine import refine_deltas

ALL = 2**31  # more entries than any context has


@dataclass(frozen=True)
class Recipe:
    """The settings that a patch is made with.

    Attributes:
        method: the form `vector`, `output`, `matrix`, `lora` or `isotropic`; or `prefix`, for key/value entries without
            deltas.
        settings: the settings of the form: rank, ridge, first layer and bias.
        prefix: the number of key/value entries for each head of a layer, on average over the layers; 0 for a patch of
            weights alone, and `ALL` for every entry of the context.
        ridges: the ridges of the entries' fit.
        answer_weight: the weight of rows that predict an answer in the entries' fit; other rows have 1.
        restate: whether dialogues that restate a long context are fitted too.
        stop: the texts that end an answer.
        samples: the number of answers to fit on for each query. The first is greedy and the rest are sampled.
        max_new_tokens: the length of the teacher's completions.
        refine_steps: the number of gradient descent steps from the closed form; 0 leaves it as it is.
        student_precision: the precision that the patch will run on, if the patch is also to repair the cost of that
            precision (quantise/student.py). With `fp32` the patch is fitted for every precision.
    """

    method: str = "output"
    settings: Settings = field(default_factory=Settings)
    prefix: int = 0
    ridges: Ridges = field(default_factory=Ridges)
    answer_weight: float = 5.0
    restate: bool = True
    stop: tuple[str, ...] = ()
    samples: int = 2
    max_new_tokens: int = 48
    refine_steps: int = 0
    student_precision: str = "fp32"


def make_patch(
    source: Source,
    model: Any,
    context: str | None,
    fitted: Sequence[str],
    held_out: Sequence[str],
    recipe: Recipe,
    *,
    name: str,
    store_context: bool = False,
    store: RolloutStore | None = None,
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
        store_context: whether to put the text itself into the patch's description.
        store: the store of the teacher's answers, which lets an interrupted run go on.

    Returns:
        The patch, with its tensors rounded to half precision as they will be stored. If it was refined, its figures
        also contain what the closed form reached on its own (`gap_closed_closed_form`).

    Raises:
        CalibrationError: `dialogues_for`, `check_beginning` or `measure_fidelity` raises it, a held-out query is also
            fitted, the form does not apply to the model, or the recipe does not fit the model or the context.
        PatchValueError: a tensor does not fit half precision.
    """
    layers = model.config.num_hidden_layers
    if not 0 <= recipe.settings.first_layer < layers:
        raise CalibrationError(
            "the model has no such block",
            field="first_layer",
            got=recipe.settings.first_layer,
            wanted=f"0..{layers - 1}",
        )
    check_disjoint(fitted, held_out)
    # This check comes before the rollout, which takes minutes.
    check_method(recipe.method, blocks_of(model))
    student = None
    if recipe.student_precision not in FLOAT_PRECISIONS:
        student = student_of(source, model, recipe.student_precision)
    elif context is None:
        raise CalibrationError(
            "there is neither a prompt to absorb nor a precision to repair",
            field="prompt",
            got="none",
            wanted="text, or --student-precision int4 or int8",
        )
    if recipe.prefix:
        if context is None:
            raise CalibrationError(
                "there is no prompt to take key/value entries from", field="prefix", got=recipe.prefix, wanted="0"
            )
        check_entries(recipe.prefix, len(check_beginning(source, context, [*fitted, *held_out]).teacher))
    if context is not None:
        check_text(context)
    prepared = None if context is None else Context.of(source, model, context, [*fitted, *held_out])
    new_tokens, samples, stop = recipe.max_new_tokens, recipe.samples, recipe.stop
    dialogues = dialogues_with(source, model, prepared, fitted, new_tokens, samples=samples, stop=stop, store=store)
    evaluation = (
        dialogues_with(source, model, prepared, held_out, new_tokens, stop=stop, store=store) if held_out else []
    )
    again = restate(source, prepared) if prepared is not None and recipe.restate else []
    calibration = Calibration(prepared, dialogues, again)
    config = PatchConfig(
        name=name,
        method=recipe.method,
        base_model=source.name,
        base_digest=source.digest,
        architecture=source.architecture,
        precision="fp32" if student is None else student.precision,
        context_digest="" if context is None else context_digest(context),
        context=context if store_context else None,
        ridge=recipe.settings.ridge,
        calibration={
            "queries": len(fitted),
            "samples": samples,
            "rows": sum(len(dialogue.completion) for dialogue in [*dialogues, *again]),
            "max_new_tokens": new_tokens,
            "holdout": len(evaluation),
            "query_digests": sorted(query_digest(query) for query in fitted),
        },
        licence=source.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    deltas, prefix = fit_patch(model, calibration, recipe, student)
    patch = Patch(to_half(deltas), config, None if prefix is None else prefix.numpy())
    cached = None if prepared is None else prepared.cached
    figures = _held_out_figures(model, patch, evaluation, student, cached) if evaluation else {}
    if recipe.refine_steps and deltas:
        with bar("refine", recipe.refine_steps, "step") as shown:
            deltas = refine_deltas(
                model,
                dialogues,
                deltas,
                recipe.refine_steps,
                prefix=prefix,
                student=student,
                progress=lambda _loss: shown.update(),
            )
        patch = Patch(to_half(deltas), config, patch.prefix)
        if evaluation:
            figures = {
                "gap_closed_closed_form": figures["gap_closed"],
                **_held_out_figures(model, patch, evaluation, student, cached),
            }
    with as_student(student):
        probe = torch_probe(model, patch, (evaluation or dialogues)[0].student())
    return Patch(patch.deltas, replace(config, fidelity=figures or None, probe=probe), patch.prefix)


def fit_patch(
    model: Any, calibration: Calibration, recipe: Recipe, student: QuantisedStudent | None = None
) -> tuple[dict[int, dict[str, TorchDelta]], TorchPrefix | None]:
    """Fit the entries and the weights of a patch in closed form.

    Args:
        model: the loaded model.
        calibration: the rows to fit on.
        recipe: the settings of the fit.
        student: the weights that the student will have, if they are not the teacher's.

    Returns:
        The deltas, layer -> site -> delta, and the entries; no deltas with the method `prefix`, and None without
        entries.

    Raises:
        CalibrationError: entries cannot replace the beginning of these prompts.
    """
    context = calibration.context
    behind = Behind(None if context is None else context.cached)
    if recipe.prefix and context is not None:
        behind = _behind(model, context, recipe)
    method = None if recipe.method == "prefix" else recipe.method
    if method is None and behind.compaction is None:
        return {}, behind.student
    with bar(f"fit {recipe.method}", model.config.num_hidden_layers, "layer") as shown:
        return fit_lockstep(
            model,
            [*calibration.dialogues, *calibration.restated],
            method,
            recipe.settings,
            behind=behind,
            student=student,
            progress=lambda _done, _all: shown.update(),
        )


def _behind(model: Any, context: Context, recipe: Recipe) -> Behind:
    entries = context.entries()
    windows = layer_windows(model)
    counts = split_budget(recipe.prefix, windows, entries.position)
    exact = [_last(entry, window) for entry, window in zip(entries.entries, windows, strict=True)]
    student = replace(entries, entries=exact)
    if counts == student.counts:
        return Behind(context.cached, student)
    kept = [
        own if count == len(own[0][0]) else whole
        for own, whole, count in zip(exact, entries.entries, counts, strict=True)
    ]
    return Behind(
        context.cached, replace(entries, entries=kept), Compaction(counts, recipe.ridges, recipe.answer_weight)
    )


def _last(entry: Entry, window: int | None) -> Entry:
    """Return the entries that a window ever sees: the text's first token sees window - 1 places in front of it."""
    return entry if window is None else (entry[0][:, 1 - window :], entry[1][:, 1 - window :])


def check_entries(entries: int, context: int) -> None:
    """Check a number of entries against the context's.

    Raises:
        CalibrationError: there are more entries than the context has.
    """
    if entries != ALL and entries > context:
        raise CalibrationError(
            "the context has fewer entries",
            field="--prefix",
            got=entries,
            wanted=f"at most {context}, the tokens of the context, or `all`",
            fix="use --prefix all, which keeps them all and is exact",
        )


def check_text(context: str) -> None:
    """Raise CalibrationError if the context is empty."""
    if not context.strip():
        raise CalibrationError("the prompt to absorb is empty", field="prompt", got=repr(context), wanted="text")


def _held_out_figures(
    model: Any,
    patch: Patch,
    evaluation: Sequence[Dialogue],
    student: QuantisedStudent | None,
    cached: TorchPrefix | None,
) -> dict[str, float]:
    with bar("held-out fidelity", len(evaluation), "query") as shown:
        measured = measure_fidelity(
            evaluation,
            TorchStudent(model, cached=cached),
            TorchStudent(model, weights=student),
            TorchStudent(model, patch, student),
            progress=shown.update,
        )
    return measured.to_dict()


def to_half(deltas: Mapping[int, Mapping[str, TorchDelta]]) -> dict[SlotKey, Delta]:
    """Convert deltas to numpy, rounded to the precision of the file, so that figures describe the stored values."""

    def array(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.to(torch.float16).float().cpu().numpy()

    return {
        (layer, site): Delta(array(delta.a), array(delta.b), array(delta.bias), array(delta.mean))
        for layer, sites in deltas.items()
        for site, delta in sites.items()
    }

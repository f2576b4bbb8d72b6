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

from ..decoder import TorchDelta, TorchPrefix, blocks_of
from ..measure import TorchStudent, measure_fidelity, torch_probe
from ..progress import bar
from ..quantise import QuantisedStudent, as_student, student_of
from ..queries import check_disjoint, query_digest
from ..rollout import Dialogue, RolloutStore, context_digest, dialogues_for
from ..source import Source
from .forms import Settings, check_method
from .lockstep import fit_lockstep
from .prefix_entries import check_prefix, choose_entries
from .refine import refine_deltas


@dataclass(frozen=True)
class Recipe:
    """The settings that a patch is made with.

    Attributes:
        method: the form `vector`, `output`, `matrix`, `lora` or `isotropic`; or `prefix`, for key/value entries without
            deltas.
        settings: the settings of the form: rank, ridge, first layer and bias.
        prefix: the number of key/value entries of the context to store for each head.
        samples: the number of answers to fit on for each query. The first is greedy and the rest are sampled.
        max_new_tokens: the length of the teacher's completions.
        refine_steps: the number of gradient descent steps from the closed form; 0 leaves it as it is.
        student_precision: the precision that the patch will run on, if the patch is also to repair the cost of that
            precision (quantise/student.py). With `fp32` the patch is fitted for every precision.
    """

    method: str = "output"
    settings: Settings = field(default_factory=Settings)
    prefix: int = 0
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
        CalibrationError: `dialogues_for`, `choose_entries` or `measure_fidelity` raises it, a held-out query is also
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
        pairs = [(source.codec.render(query, context), source.codec.render(query)) for query in [*fitted, *held_out]]
        check_prefix(pairs, recipe.prefix, source.codec.template_source, model.config, recipe.max_new_tokens)
    new_tokens, samples = recipe.max_new_tokens, recipe.samples
    calibration = dialogues_for(source, model, context, fitted, new_tokens, samples=samples, store=store)
    evaluation = dialogues_for(source, model, context, held_out, new_tokens, store=store) if held_out else []
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
            "rows": sum(len(dialogue.completion) for dialogue in calibration),
            "max_new_tokens": new_tokens,
            "holdout": len(evaluation),
            "query_digests": sorted(query_digest(query) for query in fitted),
        },
        licence=source.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    prefix = None
    if recipe.prefix:
        with bar("attention to the context", len(calibration), "query") as shown:
            prefix = choose_entries(model, calibration, recipe.prefix, shown.update)
    deltas = _closed_form(model, calibration, recipe, prefix, student)
    patch = Patch(to_half(deltas), config, None if prefix is None else prefix.numpy())
    figures = _held_out_figures(model, patch, evaluation, student) if evaluation else {}
    if recipe.refine_steps and deltas:
        with bar("refine", recipe.refine_steps, "step") as shown:
            deltas = refine_deltas(
                model,
                calibration,
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
                **_held_out_figures(model, patch, evaluation, student),
            }
    with as_student(student):
        probe = torch_probe(model, patch, (evaluation or calibration)[0].student())
    return Patch(patch.deltas, replace(config, fidelity=figures or None, probe=probe), patch.prefix)


def _closed_form(
    model: Any,
    calibration: Sequence[Dialogue],
    recipe: Recipe,
    prefix: TorchPrefix | None,
    student: QuantisedStudent | None,
) -> Mapping[int, Mapping[str, TorchDelta]]:
    if recipe.method == "prefix":
        return {}
    with bar(f"fit {recipe.method}", model.config.num_hidden_layers, "layer") as shown:
        return fit_lockstep(
            model,
            calibration,
            recipe.method,
            recipe.settings,
            prefix=prefix,
            student=student,
            progress=lambda _done, _all: shown.update(),
        )


def _held_out_figures(
    model: Any, patch: Patch, evaluation: Sequence[Dialogue], student: QuantisedStudent | None
) -> dict[str, float]:
    with bar("held-out fidelity", len(evaluation), "query") as shown:
        measured = measure_fidelity(
            evaluation,
            TorchStudent(model),
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

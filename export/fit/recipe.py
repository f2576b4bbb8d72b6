"""From a prompt to a patch: rollouts, the lock-step fit, held-out figures and the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import FLOAT_PRECISIONS, Delta, Patch, PatchConfig
from tp_runtime.session import measure_probe

from ..decoder import TorchDelta, TorchPrefix, blocks_of
from ..measure import measure_fidelity, torch_student
from ..progress import bar
from ..quantise import QuantisedStudent, as_student, student_of
from ..queries import check_disjoint, query_digest
from ..rollout import Dialogue, RolloutStore, context_digest, dialogues_for
from ..source import Source
from .forms import Settings, check_method
from .lockstep import fit_lockstep
from .prefix_entries import check_prefix, choose_entries
from .refine import refine_deltas

_PROBE_TOKENS = 48


@dataclass(frozen=True)
class Recipe:
    """How a patch is made.

    Attributes:
        method: `vector`, `output`, `matrix` or `lora`; or `prefix`, key/value entries alone.
        settings: rank, ridge and the first block to patch.
        prefix: key/value entries of the context to carry, for each head.
        samples: answers to fit on for each query, the first greedy and the rest sampled.
        max_new_tokens: length of the teacher's completions.
        refine_steps: steps of gradient descent from the closed form; 0 leaves it as it is.
        student_precision: the precision the patch will run on, where it shall repair what that costs (student.py); with
            `fp32` it is fitted for every precision.
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
        model: the same, loaded.
        context: the system prompt or context to absorb; None: nothing but a repair of `recipe.student_precision`.
        fitted: calibration queries.
        held_out: queries kept aside; the figures in the patch come from these alone.
        recipe: how.
        name: what the patch is called.
        store_context: put the text itself into the patch's description.
        store: where the teacher's answers are kept, to go on after an interruption.

    Returns:
        The patch, its tensors rounded to half precision as they will be stored. Where it was refined, its figures also
        say what the closed form alone reached (`gap_closed_closed_form`).

    Raises:
        CalibrationError: see `dialogues_for`, `choose_entries` and `measure_fidelity`; or a held-out query is also
            fitted, or the form does not apply to the model.
        PatchValueError: a tensor does not fit half precision.
    """
    layers = model.config.num_hidden_layers
    if not 0 <= recipe.settings.first_layer < layers:
        raise CalibrationError(
            "no such block", field="first_layer", got=recipe.settings.first_layer, wanted=f"0..{layers - 1}"
        )
    check_disjoint(fitted, held_out)
    # Before the minutes of rollout.
    check_method(recipe.method, blocks_of(model))
    student = None
    if recipe.student_precision not in FLOAT_PRECISIONS:
        student = student_of(source, model, recipe.student_precision)
    elif context is None:
        raise CalibrationError(
            "neither a prompt to absorb nor a precision to repair",
            field="prompt",
            got="none",
            wanted="text, or --student-precision int4 or int8",
        )
    if recipe.prefix:
        if context is None:
            raise CalibrationError("no prompt to take entries from", field="prefix", got=recipe.prefix, wanted="0")
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
    figures = _held_out(model, patch, evaluation, student) if evaluation else {}
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
            figures = {"gap_closed_closed_form": figures["gap_closed"], **_held_out(model, patch, evaluation, student)}
    with as_student(student):
        probe = _probe(model, patch, (evaluation or calibration)[0])
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


def _held_out(
    model: Any, patch: Patch, evaluation: Sequence[Dialogue], student: QuantisedStudent | None
) -> dict[str, float]:
    with bar("held-out fidelity", len(evaluation), "query") as shown:
        measured = measure_fidelity(
            evaluation,
            torch_student(model),
            torch_student(model, student=student),
            torch_student(model, patch, student),
            progress=shown.update,
        )
    return measured.to_dict()


def to_half(deltas: Mapping[int, Mapping[str, TorchDelta]]) -> dict[tuple[int, str], Delta]:
    """To numpy, rounded to what the file will hold, so that everything measured is measured on the shipped values."""

    def array(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.to(torch.float16).float().cpu().numpy()

    return {
        (layer, site): Delta(array(delta.a), array(delta.b), array(delta.bias), array(delta.mean))
        for layer, sites in deltas.items()
        for site, delta in sites.items()
    }


def _probe(model: Any, patch: Patch, dialogue: Dialogue) -> dict[str, list[Any]]:
    """A few ids with the patched model's answer to them, which `check` compares on the device."""
    first = 0 if patch.prefix is None else len(patch.prefix.replaces)
    ids = list(dialogue.student())[: first + _PROBE_TOKENS]
    logits = torch_student(model, patch)(ids, first)
    return measure_probe(ids, logits.float().cpu().numpy())

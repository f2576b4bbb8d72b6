"""From a prompt to a patch: rollouts, the lock-step fit, held-out figures and the probe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from tp_runtime.errors import CalibrationError, RequestError
from tp_runtime.patch import Delta, Patch
from tp_runtime.patch_config import PatchConfig
from tp_runtime.probe import measure as measure_probe

from . import fidelity, lockstep
from .deltas import TorchDelta
from .forms import Settings
from .progress import bar
from .questions import check_disjoint, query_digest
from .rollout import complete
from .sequences import Dialogue
from .source import Source

_PROBE_TOKENS = 48


def dialogues_for(
    source: Source, model: Any, context: str, queries: Sequence[str], max_new_tokens: int
) -> list[Dialogue]:
    """Have the teacher answer `queries` with the context in front.

    Both prompts come from the model's own chat template, with the context as the system message and without any; a
    completion-style model gets context and query, or the bare query, after BOS.

    Raises:
        CalibrationError: there are no queries, the context is empty, or every completion is empty.
        RequestError: a query cannot be rendered, or does not fit the context window.
    """
    if not context.strip():
        raise CalibrationError("the prompt to absorb is empty", field="prompt", got=repr(context), wanted="text")
    if not queries:
        raise CalibrationError("no queries", field="queries", got=0, wanted="at least one", fix="pass more queries")
    teacher = [source.codec.render(query, context) for query in queries]
    student = [source.codec.render(query) for query in queries]
    _check_length(max(map(len, teacher)) + max_new_tokens, model.config.max_position_embeddings)
    eos = source.codec.eos_ids
    with bar("teacher completions", len(queries), "query") as shown:
        completions = complete(model, teacher, max_new_tokens, eos, progress=shown.update)
    if all(set(completion) <= eos for completion in completions):
        raise CalibrationError(
            "every completion is empty",
            field="queries",
            got=f"{len(queries)} queries, no answer",
            wanted="queries that the prompted model answers",
            fix="look at the prompt: the model ends its turn at once",
        )
    return [Dialogue(tuple(t), tuple(s), c) for t, s, c in zip(teacher, student, completions, strict=True)]


def _check_length(longest: int, window: int) -> None:
    if longest > window:
        raise RequestError(
            "prompt, query and answer do not fit the context window",
            field="prompt",
            got=f"{longest} tokens",
            wanted=f"at most {window}",
            fix="shorten the prompt, or lower --max-new-tokens",
        )


def make_patch(
    source: Source,
    model: Any,
    context: str,
    fitted: Sequence[str],
    held_out: Sequence[str],
    *,
    name: str,
    method: str = "output",
    settings: Settings | None = None,
    max_new_tokens: int = 48,
    store_context: bool = False,
) -> Patch:
    """Compute a patch that stands in for `context`.

    Args:
        source: the base model.
        model: the same, loaded.
        context: the system prompt or context to absorb.
        fitted: calibration queries.
        held_out: queries kept aside; the figures in the patch come from these alone.
        name: what the patch is called.
        method: `vector`, `output`, `matrix` or `lora`.
        settings: rank, ridge and the first block to patch.
        max_new_tokens: length of the teacher's completions.
        store_context: put the text itself into the patch's description.

    Returns:
        The patch, its tensors rounded to half precision as they will be stored.

    Raises:
        CalibrationError: see `dialogues_for` and `fidelity.measure`; or a held-out query is also fitted.
        PatchValueError: a tensor does not fit half precision.
    """
    settings = settings or Settings()
    layers = model.config.num_hidden_layers
    if not 0 <= settings.first_layer < layers:
        raise CalibrationError(
            "no such block", field="first_layer", got=settings.first_layer, wanted=f"0..{layers - 1}"
        )
    check_disjoint(fitted, held_out)
    everything = dialogues_for(source, model, context, [*fitted, *held_out], max_new_tokens)
    calibration, evaluation = everything[: len(fitted)], everything[len(fitted) :]
    config = PatchConfig(
        name=name,
        method=method,
        base_model=source.name,
        base_digest=source.digest,
        architecture=source.architecture,
        precision="fp32",
        context_digest=context_digest(context),
        context=context if store_context else None,
        ridge=settings.ridge,
        calibration={
            "queries": len(calibration),
            "rows": sum(len(dialogue.completion) for dialogue in calibration),
            "max_new_tokens": max_new_tokens,
            "holdout": len(evaluation),
            "query_digests": sorted(query_digest(query) for query in fitted),
        },
        licence=source.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with bar(f"fit {method}", model.config.num_hidden_layers, "layer") as shown:
        deltas = lockstep.fit(model, calibration, method, settings, progress=lambda done, _all: shown.update())
    patch = Patch(_half(deltas), config)
    figures: dict[str, float] | None = None
    if evaluation:
        with bar("held-out fidelity", len(evaluation), "query") as shown:
            measured = fidelity.measure(
                evaluation,
                fidelity.torch_student(model),
                fidelity.torch_student(model),
                fidelity.torch_student(model, patch),
                progress=shown.update,
            )
        figures = measured.to_dict()
    probe = _probe(model, patch, (evaluation or calibration)[0])
    return Patch(patch.deltas, replace(config, fidelity=figures, probe=probe))


def context_digest(context: str) -> str:
    """SHA-256 of the context text."""
    return hashlib.sha256(context.encode()).hexdigest()


def _half(deltas: Mapping[int, Mapping[str, TorchDelta]]) -> dict[tuple[int, str], Delta]:
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
    ids = list(dialogue.student())[:_PROBE_TOKENS]
    logits = fidelity.torch_student(model, patch)(ids, 0)
    return measure_probe(ids, logits.float().cpu().numpy())

"""The closed-form fit of a patch's entries and weights, from prepared rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import round_to_int8

from ..compaction import split_budget
from ..decoder import Entry, TorchDelta, TorchPrefix, kv_shape, layer_windows
from ..progress import bar
from ..quantise import QuantisedStudent
from ..rollout import Context
from .calibration import Calibration
from .entries import ANSWER_WEIGHT, LEAST_FORWARD, Compaction
from .lockstep import Behind, fit_lockstep
from .recipe import ALL, Recipe

_HEADER_BYTES = 16_384  # of a patch file: the description, the probe and the list of tensors
_RESTATED_WEIGHT = 1.0  # of a row that predicts an answer, where the context is restated


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
        behind = _behind(model, context, recipe, bool(calibration.restated), student is None)
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


def _behind(model: Any, context: Context, recipe: Recipe, restated: bool, exact: bool) -> Behind:
    entries = context.entries()
    windows = layer_windows(model)
    counts = split_budget(recipe.prefix, windows, entries.position)
    seen = [_last(entry, window) for entry, window in zip(entries.entries, windows, strict=True)]
    student = replace(entries, entries=seen)
    if exact and counts == student.counts:
        return Behind(context.cached, student)
    # A layer that keeps all that its window ever sees keeps it as it is; another one chooses from the whole context.
    kept = [
        own if count == len(own[0][0]) else whole
        for own, whole, count in zip(seen, entries.entries, counts, strict=True)
    ]
    weight = recipe.answer_weight
    if weight is None:
        weight = _RESTATED_WEIGHT if restated else ANSWER_WEIGHT
    stored = partial(_stored, dtype=recipe.dtype)
    forward = restated and min(counts) >= LEAST_FORWARD
    compaction = Compaction(counts, recipe.ridges, weight, forward=forward, exact=exact, stored=stored)
    return Behind(context.cached, replace(entries, entries=kept), compaction)


def _stored(entry: Entry, dtype: str) -> Entry:
    """Return the entries of a layer [kv heads, n, head dim] as a file of that dtype gives them back."""
    if dtype != "i8":
        kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
        key, value = (part.to(kinds[dtype]).to(part.dtype) for part in entry)
        return key, value
    key, value = (
        torch.from_numpy(round_to_int8(part, tensor.transpose(0, 1).float().cpu().numpy())).to(tensor).transpose(0, 1)
        for part, tensor in zip(("key", "value"), entry, strict=True)
    )
    return key, value


def entry_bytes(config: Any, windows: Sequence[int | None], context: int, dtype: str, average: int) -> int:
    """Return about how many bytes a file of entries alone has.

    Args:
        config: the model's transformers config.
        windows: the window of each layer; None for a layer that sees everything.
        context: the number of entries that the context has.
        dtype: the dtype of the file.
        average: the number of entries of a layer on average.
    """
    heads, head_dim = kv_shape(config)
    counts = split_budget(average, windows, context)
    numbers = 2 * heads * head_dim * sum(counts)
    if dtype != "i8":
        return _HEADER_BYTES + numbers * (4 if dtype == "f32" else 2)
    scales = heads * head_dim * len(counts) + heads * sum(counts)  # one for each channel, and one for each value
    return _HEADER_BYTES + numbers + 2 * scales


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

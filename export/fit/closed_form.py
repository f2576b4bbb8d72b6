"""The closed-form fit of a patch's entries and weights, from prepared rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import entry_nbytes, entry_tensors, round_lines_to_int4, round_to_int8

from ..compaction import split_budget
from ..decoder import Entry, TorchDelta, TorchPrefix, kv_shape, layer_windows
from ..progress import bar
from ..quantise import QuantisedStudent
from ..rollout import Context
from .calibration import Calibration
from .entries import ANSWER_WEIGHT, LEAST_FORWARD, Compaction
from .lockstep import Behind, fit_lockstep
from .recipe import ALL, Recipe

_NAMED_BYTES = 105  # of a tensor in the list of tensors of a patch file
_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
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
        # Four bits lose something even where all entries are kept, which fitted values make up for.
        exact = student is None and recipe.dtype != "i4"
        behind = _behind(model, context, recipe, bool(calibration.restated), exact)
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


def _stored(lines: Tensor, dtype: str) -> Tensor:
    """Return lines [..., k] of keys or values as a file of that dtype gives them back."""
    if dtype in _FLOATS:
        return lines.to(_FLOATS[dtype]).to(lines.dtype)
    array = lines.detach().float().cpu().numpy()
    if dtype == "i4":
        return torch.from_numpy(round_lines_to_int4(array)).to(lines)
    # One scale for each line, as the values of an entry have.
    rounded = round_to_int8("value", array.reshape(-1, 1, array.shape[-1]))
    return torch.from_numpy(rounded.reshape(array.shape)).to(lines)


def entry_bytes(
    config: Any, windows: Sequence[int | None], context: int, described: int, dtype: str, average: int
) -> int:
    """Return about how many bytes a file of entries alone has.

    Args:
        config: the model's transformers config.
        windows: the window of each layer; None for a layer that sees everything.
        context: the number of entries that the context has.
        described: the bytes of the patch's description.
        dtype: the dtype of the file.
        average: the number of entries of a layer on average.
    """
    heads, head_dim = kv_shape(config)
    counts = split_budget(average, windows, context)
    listed = _NAMED_BYTES * entry_tensors(dtype) * len(counts)
    return described + listed + sum(entry_nbytes(dtype, count, heads, head_dim) for count in counts)


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
            fix="use --prefix all, which keeps them all",
        )

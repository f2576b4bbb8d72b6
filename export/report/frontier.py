"""Fidelity against bytes: from a patch of weights only, over patches with a KV prefix, to the cached prompt.

Every point is fitted in the same run on the same rows and measured on the same held-out queries. There is one point
with weights only, and for each growing number of entries one point with entries only and one with both. The last
point has all entries. It is the cached prompt, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tp_runtime.patch import Patch

from ..decoder import TorchPrefix
from ..fit import Settings, choose_entries, fit_lockstep, to_half
from ..measure import Arm, TorchStudent, diverge, gap_closed, with_prompt, without_prompt
from ..progress import bar
from ..rollout import Dialogue
from .figures import Point

_ALL = 1 << 20


def measure_frontier(
    model: Any, calibration: Sequence[Dialogue], held: Sequence[Dialogue], like: Patch, entries: Sequence[int]
) -> list[Point]:
    """Measure a patch of weights only, patches with each number of `entries`, and all entries of the prompt.

    Each number of entries is measured twice: alone, and with weights fitted after the entries are in place.

    Args:
        model: a transformers causal language model whose architecture has an adapter.
        calibration: the dialogues to fit on.
        held: the held-out dialogues to measure on.
        like: the patch whose rank and ridge the weights get; their form is `output`.
        entries: numbers of key/value entries per head, ascending.

    Returns:
        One point for each mixture.
    """
    settings = Settings.of(like)
    arms: dict[str, Arm] = {"none": without_prompt(TorchStudent(model))}
    sizes: dict[str, tuple[int, int, bool]] = {}  # name -> (entries, bytes, whether it has weights)
    for count in (0, *entries, _ALL):
        prefix = None
        if count:
            with bar(f"{'all' if count == _ALL else count} entries", len(calibration), "query") as shown:
                prefix = choose_entries(model, calibration, count, shown.update)
        weights = (False, True) if prefix is not None and count != _ALL else (prefix is None,)
        for fitted in weights:
            patch = _patch(model, calibration, like, settings, prefix, fitted)
            name = f"{count} {fitted}"
            arms[name] = without_prompt(TorchStudent(model, patch))
            sizes[name] = (0 if prefix is None else len(prefix), patch.nbytes, fitted)
    with bar("fidelity against bytes", len(held), "query") as shown:
        found = diverge(held, with_prompt(TorchStudent(model)), arms, shown.update)
    base = found["none"].mean
    return [Point(*sizes[name], gap_closed=gap_closed(base, found[name].mean)) for name in sizes]


def _patch(
    model: Any,
    calibration: Sequence[Dialogue],
    like: Patch,
    settings: Settings,
    prefix: TorchPrefix | None,
    weights: bool,
) -> Patch:
    kept = None if prefix is None else prefix.numpy()
    if not weights:
        return Patch({}, like.config, kept)
    with bar("fit output", model.config.num_hidden_layers, "layer") as shown:
        deltas = fit_lockstep(model, calibration, "output", settings, prefix=prefix, progress=lambda *_: shown.update())
    return Patch(to_half(deltas), like.config, kept)

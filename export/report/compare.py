"""The comparison of methods, fitted in one run on the rows that the patch was fitted on.

A patch stores a digest of each query it was fitted on. Its calibration queries are found again by these digests, among
the built-in questions or in the file that they came from. A heuristic gets the setting that is best on the fitted
queries, as its users would choose it. A closed form gets the patch's own setting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tp_runtime.errors import PatchValueError
from tp_runtime.patch import Delta, Patch

from ..decoder import TorchDelta
from ..fit import (
    Settings,
    assemble,
    fit_lockstep,
    fit_steering,
    restate,
    steering_candidates,
)
from ..measure import Divergence, TorchStudent, cached_teacher, diverge, measure_closeness, with_prompt, without_prompt
from ..progress import bar
from ..queries import query_digest
from ..rollout import Context, Dialogue, RolloutStore, dialogues_for
from .figures import Baseline, Fits
from .setup import Setup, Subject

METHODS = ("steering", "isotropic", "vector", "output", "matrix")
NOT_FOUND = "the queries that this patch was fitted on are not among those given (--calibration FILE)"
_ISOTROPIC_RIDGES = (1.0, 10.0, 100.0)
_TUNED_ON = 4  # the number of fitted queries on which a heuristic's setting is chosen
# The largest relative difference at which tensors count as the same. It covers two differences: the rounding in the
# file, and the float noise of another machine.
_SAME = 4e-3


@dataclass(frozen=True)
class Fit:
    """One fitted method.

    Attributes:
        patch: the fitted patch.
        setting: the setting that was used, in words.
        seconds: the duration of the fit.
        retained: layer -> site -> the share of the energy that the rank keeps.
    """

    patch: Patch
    setting: str
    seconds: float
    retained: dict[int, dict[str, float]]


def fitted_queries(patch: Patch, queries: Sequence[str]) -> list[str]:
    """Return those of `queries` that the patch was fitted on.

    The list is empty unless every query whose digest the patch stores is among `queries`.
    """
    digests = set((patch.config.calibration or {}).get("query_digests", ()))
    found = [query for query in queries if query_digest(query) in digests]
    return found if len(found) == len(digests) else []


def measure_fits(
    setup: Setup, subject: Subject, held: Sequence[Dialogue], unpatched: Divergence, store: RolloutStore
) -> tuple[Fits, dict[int, dict[str, float]]]:
    """Fit the methods of `setup` on the rows of the patch, and measure them on the held-out dialogues.

    Args:
        setup: the models and the methods.
        subject: the patch to compare with.
        held: the held-out dialogues.
        unpatched: the divergence of the model without a prompt and without a patch.
        store: the store of the answers to the calibration queries.

    Returns:
        The compared methods, and layer -> site -> the share of energy that the patch's own fit keeps.
    """
    if not setup.methods:
        return Fits(0, 0, False, [], "left out with --baselines none"), {}
    if not subject.fitted:
        return Fits(0, 0, False, [], NOT_FOUND), {}
    model, patch = setup.model, subject.patch
    calibration = _calibration(setup, subject, store)
    fits = {method: fit_method(model, calibration, method, patch) for method in setup.methods}
    arms = {m: without_prompt(TorchStudent(model, fit.patch)) for m, fit in fits.items() if fit is not None}
    with bar("methods on held-out queries", len(held), "query") as progress:
        found = diverge(held, with_prompt(cached_teacher(model, held)), arms, progress.update)
    methods = []
    for method, fit in fits.items():
        if fit is None:
            methods.append(Baseline(method, "no setting gives finite tensors", None, 0, 0.0))
        else:
            close = measure_closeness(unpatched, found[method])
            methods.append(Baseline(method, fit.setting, close, fit.patch.nbytes, fit.seconds))
    same = fits.get(patch.config.method)
    exact = same is not None and same_tensors(same.patch, patch)
    rows = sum(len(d.completion) for d in calibration)
    return Fits(len(subject.fitted), rows, exact, methods), same.retained if same is not None and exact else {}


def _calibration(setup: Setup, subject: Subject, store: RolloutStore) -> list[Dialogue]:
    """Return the dialogues that the patch was fitted on: the answers, generated again, and those that restate."""
    config = subject.patch.config
    made = config.calibration or {}
    limit, samples = int(made.get("max_new_tokens", setup.max_new_tokens)), int(made.get("samples", 1))
    model, queries = setup.model, subject.fitted
    asked = setup.asked_fitted(subject)
    context = Context.of(model, asked, asked.pairs(queries))
    options: dict[str, Any] = {"samples": samples, "stop": config.stop, "cached": context.cached, "store": store}
    dialogues = dialogues_for(model, asked, queries, limit, **options)
    if sum(len(dialogue.completion) for dialogue in dialogues) == made.get("rows"):  # it was fitted on answers alone
        return dialogues
    return [*dialogues, *restate(context)]


def fit_method(model: Any, calibration: Sequence[Dialogue], method: str, like: Patch) -> Fit | None:
    """Fit one method with the rank and ridge of `like`; a heuristic is tuned on the first fitted queries.

    Args:
        model: a transformers causal language model whose architecture has an adapter.
        calibration: the dialogues to fit on.
        method: one of METHODS.
        like: the patch whose rank, ridge and description the fit gets.

    Returns:
        The fit, or None if no setting gives finite tensors; this can happen with an isotropic Gram.
    """
    start = time.perf_counter()
    settings = Settings.of(like)
    tried = []
    for deltas, setting in _candidates(model, calibration, method, settings):
        with suppress(PatchValueError):
            tried.append((_patch(deltas, method, like), setting, deltas))
    if not tried:
        return None
    chosen = 0
    if len(tried) > 1:
        arms = {str(i): without_prompt(TorchStudent(model, patch)) for i, (patch, _, _) in enumerate(tried)}
        some = calibration[:_TUNED_ON]
        with bar(f"choose {method}", len(some), "query") as shown:
            found = diverge(some, with_prompt(cached_teacher(model, some)), arms, shown.update)
        chosen = min(range(len(tried)), key=lambda i: np.nan_to_num(found[str(i)].mean, nan=np.inf))
    patch, setting, deltas = tried[chosen]
    retained = {
        layer: {site: delta.retained for site, delta in sites.items() if delta.retained is not None}
        for layer, sites in deltas.items()
    }
    return Fit(patch, setting, time.perf_counter() - start, retained)


def same_tensors(one: Patch, other: Patch) -> bool:
    """Return whether two patches have equal deltas in every slot, up to rounding."""
    if set(one.deltas) != set(other.deltas):
        return False
    return all(_close(one.deltas[slot], other.deltas[slot]) for slot in one.deltas)


def _close(one: Delta, other: Delta) -> bool:
    if one.rank != other.rank or (one.bias is None) != (other.bias is None):
        return False

    def near(x: Any, y: Any) -> bool:
        return bool(np.linalg.norm(x - y) <= _SAME * np.linalg.norm(y))

    # Only the product of a and b is unique: the signs may differ, and directions of equal energy may be rotated.
    if one.a is not None and one.b is not None and other.a is not None and other.b is not None:
        same_pair = near(one.a @ one.b, other.a @ other.b)
    else:
        same_pair = True
    return same_pair and (one.bias is None or near(one.bias, other.bias))


def _candidates(
    model: Any, calibration: Sequence[Dialogue], method: str, settings: Settings
) -> Iterator[tuple[dict[int, dict[str, TorchDelta]], str]]:
    """Yield (deltas, setting in words) for every setting that a user of the method would try."""
    layers = model.config.num_hidden_layers
    if method == "steering":
        with bar("fit steering", layers, "layer") as shown:
            vectors = fit_steering(model, calibration, progress=lambda *_: shown.update())
        for chosen, strength in steering_candidates(layers):
            place = f"layer {chosen[0]}" if len(chosen) == 1 else "all layers"
            yield (
                {i: {"mlp_out": _scaled(vectors[i]["mlp_out"], strength)} for i in chosen},
                f"{place}, strength {strength:g}",
            )
        return
    ridges = _ISOTROPIC_RIDGES if method == "isotropic" else (settings.ridge,)
    for ridge in ridges:
        one = replace(settings, ridge=ridge)
        with bar(f"fit {method}", layers, "layer") as shown:
            deltas, _ = fit_lockstep(model, calibration, method, one, progress=lambda *_, s=shown: s.update())
        yield deltas, "" if method == "vector" else f"rank {one.rank}, ridge {ridge:g}"


def _scaled(vector: TorchDelta, strength: float) -> TorchDelta:
    assert vector.bias is not None
    return TorchDelta(strength * vector.bias)


def _patch(deltas: dict[int, dict[str, TorchDelta]], method: str, like: Patch) -> Patch:
    config = replace(like.config, name=method, method=method, probe=None, fidelity=None, report=None)
    return assemble(deltas, None, config, like.dtype)

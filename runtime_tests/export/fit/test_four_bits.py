"""Patches of four bits, from the prompt to the runtime: fitted for their rounding, measured as stored, and chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tp_export.fit import ALL, Recipe, Target, make_patch
from tp_export.measure import TorchStudent, measure_fidelity
from tp_export.rollout import Prompting, dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import CalibrationError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

CONTEXT = "Always talk like a pirate, and mention the sea in every single answer. " * 3
FITTED = [f"Is {thing} better than {other}?" for thing in ("tea", "rain", "salt", "gold") for other in ("ale", "sun")]
HELD_OUT = ["How far is the moon?", "Why is it cold?", "What do cats eat?"]
RECIPE = Recipe(method="prefix", prefix=8, dtype="i4", samples=1, max_new_tokens=8)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def base(request: pytest.FixtureRequest) -> tuple[Source, Any, Path]:
    """A model, with and without windows, and its export."""
    source = open_source(request.getfixturevalue(f"tiny_{request.param}"))
    return source, load_model(source), request.getfixturevalue(f"tiny_{request.param}_export")


def made(base: tuple[Source, Any, Path], recipe: Recipe, **options: Any) -> Patch:
    source, model, _folder = base
    return make_patch(source, model, CONTEXT, FITTED, HELD_OUT, recipe, name="pirate", **options)


def gap_closed(base: tuple[Source, Any, Path], patch: Patch) -> float:
    source, model, _folder = base
    held = dialogues_for(model, Prompting(source.codec, CONTEXT), HELD_OUT, 8)
    found = measure_fidelity(held, TorchStudent(model), TorchStudent(model), TorchStudent(model, patch))
    assert found.gap_closed is not None
    return found.gap_closed


@pytest.mark.parametrize("prefix", [8, ALL])
def test_the_runtime_runs_what_was_fitted_and_measured(
    base: tuple[Source, Any, Path], prefix: int, tmp_path: Path
) -> None:
    patch = made(base, replace(RECIPE, prefix=prefix))
    assert patch.dtype == "i4" and patch.rounded("i4").identity == patch.identity
    assert patch.config.fidelity is not None
    assert patch.config.fidelity["gap_closed"] == pytest.approx(gap_closed(base, patch), abs=1e-4)
    patch.save(tmp_path / "p.safetensors")
    model = PatchedModel.from_pretrained(base[2], device="cpu")
    model.load_patch(tmp_path / "p.safetensors", name="pirate", check=True)  # against the host's probe
    assert model.patches["pirate"].identity == patch.identity


def test_all_entries_that_are_fitted_for_four_bits_beat_entries_that_are_rounded_to_them(
    base: tuple[Source, Any, Path],
) -> None:
    """On a random model with windows both close more than 0.999."""
    fitted = made(base, replace(RECIPE, prefix=ALL))
    rounded = made(base, replace(RECIPE, prefix=ALL, dtype="f32")).rounded("i4")
    gaps = gap_closed(base, fitted), gap_closed(base, rounded)
    assert gaps[0] > gaps[1] or min(gaps) > 0.999


def test_the_search_takes_as_many_entries_in_four_bits_as_fit(base: tuple[Source, Any, Path]) -> None:
    whole = made(base, replace(RECIPE, prefix=ALL))
    limit = whole.nbytes - 200
    patch = made(base, RECIPE, target=Target(max_bytes=limit))
    assert whole.prefix is not None and patch.prefix is not None
    assert patch.dtype == "i4" and max(patch.prefix.counts) < max(whole.prefix.counts)
    assert patch.nbytes <= limit


def test_a_file_that_turns_out_larger_than_its_limit_is_refused(
    base: tuple[Source, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_export.fit.make._MEASURED_BYTES", -20_000)
    with pytest.raises(CalibrationError, match="more bytes than its estimate said") as error:
        made(base, RECIPE, target=Target(max_bytes=2_000))
    assert error.value.field == "--max-bytes"


def test_an_odd_head_dim_is_refused_before_the_rollout(
    base: tuple[Source, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_export.fit.make.kv_shape", lambda _config: (2, 7))
    monkeypatch.setattr("tp_export.fit.make.dialogues_for", None)
    with pytest.raises(CalibrationError, match="head dim is odd"):
        made(base, RECIPE)

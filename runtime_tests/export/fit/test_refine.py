"""Refinement: it lowers the KL on the fitted queries, does not change the base, and adds no parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.entries import some_entries
from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import token_ids
from runtime_tests.patches import random_config
from tp_export import cli
from tp_export.decoder import TorchPrefix
from tp_export.fit import Recipe, Settings, assemble, lockstep, make_patch
from tp_export.fit.refine import refine_deltas
from tp_export.measure import TorchStudent, measure_fidelity
from tp_export.rollout import Dialogue
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch

CONTEXT = tuple(token_ids(12, seed=9))


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2", "gpt_neox"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(open_source(tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def dialogues() -> list[Dialogue]:
    queries = [tuple(token_ids(5, seed=s)) for s in range(6)]
    return [Dialogue((1, *CONTEXT, *q), (1, *q), tuple(token_ids(7, seed=20 + s))) for s, q in enumerate(queries)]


def divergence(model: Any, deltas: Any, prefix: TorchPrefix | None) -> float:
    patch = assemble(deltas, prefix, random_config(), "f16")
    return measure_fidelity(
        dialogues(), TorchStudent(model), TorchStudent(model), TorchStudent(model, patch)
    ).kl_patched


@pytest.mark.parametrize("entries", [0, 4])
def test_refinement_brings_the_student_closer_and_does_not_change_the_base(model: Any, entries: int) -> None:
    prefix = some_entries(model, dialogues(), entries) if entries else None
    behind = lockstep.Behind(student=prefix)
    closed, _ = lockstep.fit_lockstep(model, dialogues(), "output", Settings(rank=2), behind=behind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses: list[float] = []
    refined = refine_deltas(model, dialogues(), closed, 30, prefix=prefix, progress=losses.append)
    assert len(losses) == 30
    assert divergence(model, refined, prefix) < divergence(model, closed, prefix)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    for layer, sites in refined.items():
        for site, delta in sites.items():
            assert delta.a is not None and delta.a.shape == closed[layer][site].a.shape and not delta.a.requires_grad
            assert delta.mean is None  # the directions are no longer in order of energy, so no mean is stored


def test_the_figures_before_and_after_refinement_are_in_the_patch(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    recipe = Recipe(max_new_tokens=6, samples=1, refine_steps=2)
    patch = make_patch(source, load_model(source), "Talk like a pirate.", ["Hi?", "Why?"], ["Who?"], recipe, name="p")
    assert patch.config.fidelity is not None
    assert patch.config.fidelity["gap_closed"] != patch.config.fidelity["gap_closed_closed_form"]


@pytest.mark.parametrize("dtype", ["i4", "i8", "f32"])
def test_entries_keep_their_dtype_beside_refined_weights(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    source = open_source(tiny_llama)
    recipe = Recipe("output", Settings(2), max_new_tokens=6, samples=1, refine_steps=1, prefix=4, dtype=dtype)
    patch = make_patch(source, load_model(source), "Talk like a pirate.", ["Hi?", "Why?"], ["Who?"], recipe, name="p")
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert (loaded.dtype, loaded.identity) == (dtype, patch.identity) and loaded.prefix is not None


def test_refinement_of_an_offloaded_model_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "p.safetensors")
    assert cli.main(["patch", str(tiny_llama), out, "--prompt", "Hi", "--refine", "1", "--offload"]) == 2
    assert "--refine" in capsys.readouterr().err

"""The two heuristic baselines compared with their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.rows import fit_affine
from tp_export.decoder import blocks_of
from tp_export.fit import Settings, fit_steering, lockstep, steering_candidates
from tp_export.fit.baselines import fit_isotropic, isotropic_map
from tp_export.fit.forms import Rows
from tp_export.rollout import Dialogue
from tp_export.source import load_model, open_source


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_gemma: Path) -> Any:
    return load_model(open_source(tiny_llama if request.param == "llama" else tiny_gemma))


def dialogues() -> list[Dialogue]:
    g = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (n,), generator=g).tolist())

    return [Dialogue((1, *ids(7), *(q := ids(4 + i % 3))), (1, *q), ids(5)) for i in range(5)]


def test_isotropic_is_a_sum_of_rank_one_updates() -> None:
    """M = sum_t d_t a_t^T / (c + l), on centred rows without the sink's direction.

    c is the mean of the Gram matrix's diagonal.
    """
    g = torch.Generator().manual_seed(1)
    a, d = torch.randn(40, 12, generator=g, dtype=torch.float64), torch.randn(40, 7, generator=g, dtype=torch.float64)
    sink = torch.randn(12, generator=g, dtype=torch.float64)
    found = isotropic_map(a, d, 0.5, sink)
    s = sink / sink.norm()
    rows = a - a.mean(0)
    rows = rows - torch.outer(rows @ s, s)
    c = (rows.T @ rows).diag().mean()
    wanted = sum(torch.outer(d[t] - d.mean(0), rows[t]) for t in range(40)) / (c + 0.5 * c)
    assert torch.allclose(found.matrix, wanted, atol=1e-10)
    assert torch.allclose(found.matrix @ sink, torch.zeros(7, dtype=torch.float64), atol=1e-10)
    unit = torch.eye(12, dtype=torch.float64)
    assert torch.allclose(found.energy, wanted @ (1.5 * c * unit) @ wanted.T, atol=1e-10)


def test_isotropic_equals_the_ridge_solution_on_isotropic_rows() -> None:
    g = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
    a = torch.cat([q, -q])  # centred, and a^T a = 2 I
    d = torch.randn(16, 5, generator=g, dtype=torch.float64)
    # Both fits project out the sink's direction. The rest of the Gram matrix is no longer a multiple of the identity,
    # but it is one on the space where M acts. c counts the lost direction as one of n.
    sink = q[0]
    share = 7 / 8
    isotropic, ridge = isotropic_map(a, d, 1.0, sink), fit_affine(a, d, 1.0, sink)
    assert torch.allclose(isotropic.matrix * (2 * share), ridge.matrix * (1 + share), atol=1e-10)


@torch.no_grad()
def test_isotropic_fills_the_output_slot_and_keeps_the_mean(model: Any) -> None:
    g = torch.Generator().manual_seed(3)
    width = model.config.hidden_size
    student = torch.randn(50, width, generator=g)
    rows = Rows(student + 0.3 * torch.randn(50, width, generator=g), student, torch.randn(1, width, generator=g))
    block = blocks_of(model)[1]
    delta = fit_isotropic(block, rows, Settings(rank=4))["mlp_out"]
    assert delta.a is not None and delta.a.shape[1] == 4 and 0 < (delta.retained or 0) < 1
    target = block.mlp_half(rows.teacher) - block.mlp_half(rows.student)
    assert torch.allclose(delta(block.hidden(rows.student)).mean(0), target.mean(0), atol=1e-3)


@torch.no_grad()
def test_steering_is_the_mean_difference_of_the_residual_stream(model: Any) -> None:
    """In transformers, the output of block i is hidden_states[i + 1], except that the last one has the final norm."""
    data = dialogues()
    found = fit_steering(model, data, batch_size=2)
    differences = []
    for d in data:
        sides = []
        for ids, start in ((d.teacher(), len(d.teacher_prompt) - 1), (d.student(), len(d.student_prompt) - 1)):
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            sides.append(torch.stack(states[1:-1])[:, 0, start:])
        differences.append(sides[0] - sides[1])
    wanted = torch.cat(differences, 1).mean(1)
    assert len(found) == len(wanted) + 1
    for layer, mean in enumerate(wanted):
        assert torch.allclose(found[layer]["mlp_out"].bias, mean, atol=1e-4)


def test_steering_is_not_sequential(model: Any) -> None:
    """Layer 0 equals that of the lock-step vector. Above it, `vector` is fitted on an already corrected student."""
    data = dialogues()
    steering, (vector, _) = fit_steering(model, data), lockstep.fit_lockstep(model, data, "vector", Settings())
    biases = [(steering[i]["mlp_out"].bias, vector[i]["mlp_out"].bias) for i in (0, 1)]
    assert torch.allclose(*biases[0], atol=1e-4) and not torch.allclose(*biases[1], atol=1e-2)


@pytest.mark.parametrize("layers", [1, 3, 30])
def test_steering_candidates_cover_only_the_layers_of_the_model(layers: int) -> None:
    tried = list(steering_candidates(layers))
    assert {i for chosen, _ in tried for i in chosen} == set(range(layers))
    assert all(strength > 0 for _, strength in tried)
    assert len({len(chosen) for chosen, _ in tried}) == (1 if layers == 1 else 2)

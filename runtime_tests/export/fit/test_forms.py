"""The static forms at one block, and the lock-step fit of all blocks, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.rows import some_rows
from runtime_tests.patches import random_config
from tp_export.decoder import applied, blocks_of, layer_inputs, patched, plain_inputs
from tp_export.fit import Settings, assemble, lockstep
from tp_export.fit.forms import FORMS
from tp_export.rollout import Dialogue
from tp_export.source import load_model, open_source


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_gemma: Path) -> Any:
    return load_model(open_source(tiny_llama if request.param == "llama" else tiny_gemma))


def dialogues(count: int = 6, completion: int = 5) -> list[Dialogue]:
    g = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (n,), generator=g).tolist())

    out = []
    for i in range(count):
        query = ids(4 + i % 3)
        out.append(Dialogue((1, *ids(7), *query), (1, *query), ids(completion)))
    return out


@torch.no_grad()
def test_vector_is_the_mean_difference_of_the_outputs(model: Any) -> None:
    block, rows = blocks_of(model)[1], some_rows(model, 30)
    deltas = FORMS["vector"](block, rows, Settings())
    wanted = (block.mlp_half(rows.teacher) - block.mlp_half(rows.student)).mean(0)
    assert set(deltas) == {"mlp_out"} and deltas["mlp_out"].a is None
    assert torch.allclose(deltas["mlp_out"].bias, wanted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["output", "matrix"])
def test_without_ridge_and_at_full_rank_the_student_becomes_the_teacher(model: Any, method: str) -> None:
    """With fewer rows than inputs the regression can interpolate, so it must reproduce every output of the block."""
    block, rows = blocks_of(model)[1], some_rows(model, 20)
    deltas = FORMS[method](block, rows, Settings(rank=model.config.hidden_size, ridge=1e-9))
    wanted = block.mlp_half(rows.teacher)
    before = (block.mlp_half(rows.student) - wanted).abs().max()
    with applied(block, deltas):
        after = (block.mlp_half(rows.student) - wanted).abs().max()
    assert after < 1e-3 * before


@torch.no_grad()
def test_matrix_uses_one_map_for_gate_and_up(model: Any) -> None:
    """dW_gate = W_gate M and dW_up = W_up M with the ridge map M of z, and one shared low-rank factor."""
    from runtime_tests.export.rows import fit_affine

    block, rows = blocks_of(model)[0], some_rows(model, 60)
    deltas = FORMS["matrix"](block, rows, Settings(rank=model.config.hidden_size, ridge=0.7))
    z_teacher, z_student = block.mlp_norm(rows.teacher), block.mlp_norm(rows.student)
    m = fit_affine(z_student, z_teacher - z_student, 0.7, block.mlp_norm(rows.sink)[0]).matrix
    for site, linear in block.mlps[0].reads_z.items():
        delta = deltas[site]
        assert delta.a is not None and delta.b is not None
        assert torch.allclose((delta.a @ delta.b).double(), (linear.weight.double() @ m).T, atol=2e-4)
    assert deltas["mlp_out"].a is not None


@torch.no_grad()
@pytest.mark.parametrize("method", ["output", "matrix"])
def test_the_bias_reproduces_the_mean_at_every_rank(model: Any, method: str) -> None:
    """With or without truncation, the mean output of the block over the fitted rows is the teacher's mean."""
    block, rows = blocks_of(model)[2], some_rows(model, 60)
    wanted = block.mlp_half(rows.teacher).mean(0)
    for rank in (1, 4):
        with applied(block, FORMS[method](block, rows, Settings(rank=rank))):
            assert torch.allclose(block.mlp_half(rows.student).mean(0), wanted, atol=1e-4)


@torch.no_grad()
def test_a_truncated_patch_equals_a_fit_of_that_rank(model: Any) -> None:
    block, rows = blocks_of(model)[0], some_rows(model, 60)
    big, small = (FORMS["output"](block, rows, Settings(rank=rank))["mlp_out"] for rank in (12, 3))
    patch = assemble({0: {"mlp_out": big}}, None, random_config(), "f16").truncate(3)
    ours = patch.deltas[0, "mlp_out"]
    hidden = block.hidden(rows.student)
    wanted = small(hidden)
    got = hidden @ torch.tensor(ours.a) @ torch.tensor(ours.b) + torch.tensor(ours.bias)
    assert (got - wanted).abs().max() < 5e-3 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(FORMS))
def test_the_lockstep_fit_agrees_with_the_patched_model(model: Any, method: str) -> None:
    """The lock-step fit and the hooks on the whole model give the same v at the last block, measured by the logits."""
    data = dialogues()
    deltas, _ = lockstep.fit_lockstep(model, data, method, Settings(rank=3), batch_size=2)
    patch = assemble(deltas, None, random_config(), "f16")
    with_big_batches, _ = lockstep.fit_lockstep(model, data, method, Settings(rank=3), batch_size=6)
    ids = torch.tensor([data[0].student()])
    hidden, kwargs = layer_inputs(model, ids, plain_inputs(torch.ones_like(ids)))
    for block in blocks_of(model):
        with applied(block, with_big_batches[block.index]):
            hidden = block.mlp_half(block.attention_half(hidden, kwargs[block.index]))
    with patched(model, patch):
        wanted = model(ids, use_cache=False).logits
    got = model.lm_head(model.model.norm(hidden))
    assert (got - wanted).abs().max() < 5e-3 * wanted.abs().max()


@torch.no_grad()
def test_the_cost_of_a_fit_is_one_pass_of_teacher_and_student(model: Any) -> None:
    """The tokens of teacher and student pass through attention once each, which is the cost that the README states."""
    data = dialogues()
    count = [0]
    handles = [
        block.layer.self_attn.register_forward_pre_hook(
            lambda _m, args, kwargs: count.__setitem__(0, count[0] + kwargs["hidden_states"].shape[:2].numel()),
            with_kwargs=True,
        )
        for block in blocks_of(model)
    ]
    lockstep.fit_lockstep(model, data, "output", Settings(), batch_size=6)
    for handle in handles:
        handle.remove()
    longest = max(len(d.teacher()) for d in data) + max(len(d.student()) for d in data)
    assert count[0] == longest * len(data) * len(blocks_of(model))

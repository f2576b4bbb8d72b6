"""Coordinate descent on a rounded weight: less loss, scales by regression, and levels that no single change betters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tp_export.quantise import descent
from tp_export.quantise.descent import descend

BLOCKS, SIZE, OUTPUTS = 3, 32, 6
INPUTS = BLOCKS * SIZE
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def case(seed: int, padding: int = 0, symmetric: bool = False) -> Case:
    """Return a weight, a Hessian of correlated rows, and the levels, scales and zero points of rounding to nearest."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    hessian = mixed.T @ mixed / 200 + torch.eye(INPUTS)
    weight = torch.randn(INPUTS, OUTPUTS, generator=generator)
    if padding:
        weight[-padding:], hessian[-padding:], hessian[:, -padding:] = 0, 0, 0
    blocks = weight.view(BLOCKS, SIZE, OUTPUTS)
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    scales = torch.where(high > -low, high, low) / -8 if symmetric else (high - low) / 15
    zeros = torch.full_like(scales, 8.0) if symmetric else (-low / scales).round()
    levels = (blocks / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return weight, hessian, levels, scales, zeros


def losses(weight: Tensor, hessian: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    missed = weight - ((levels - zeros[:, None]) * scales[:, None]).flatten(0, 1)
    return (missed * (hessian @ missed)).sum(0)


def state(given: Case) -> tuple[Tensor, Tensor]:
    """Return the dequantised weight Ŵ and H (W - Ŵ)."""
    weight, hessian, levels, scales, zeros = given
    values = ((levels - zeros[:, None]) * scales[:, None]).flatten(0, 1)
    return values, hessian @ (weight - values)


def swept(given: Case) -> None:
    """Sweep until no level changes any more."""
    _weight, hessian, levels, scales, zeros = given
    values, pulls = state(given)
    for _ in range(50):
        before = levels.clone()
        descent._sweep(hessian, levels, scales, zeros, values, pulls)
        if torch.equal(levels, before):
            return
    pytest.fail("the levels still change after 50 sweeps")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("seed", range(3))
def test_every_output_loses_less_with_every_round(
    seed: int, padding: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian, levels, scales, zeros = given = case(seed, padding, symmetric)
    first = before = losses(*given)
    for rounds in range(descent._ROUNDS + 1):
        monkeypatch.setattr(descent, "_ROUNDS", rounds)
        found, fitted = descend(*given)
        now = losses(weight, hessian, found, fitted, zeros)
        assert (now <= before * (1 + 1e-4)).all()
        before = now
    assert (before < 0.9 * first).all()
    assert found.shape == levels.shape and fitted.shape == scales.shape
    assert (found == found.round()).all() and found.min() >= 0 and found.max() <= 15
    assert not padding or torch.equal(found[-1, -padding:], levels[-1, -padding:])
    assert all(torch.equal(one, other) for one, other in zip(given, case(seed, padding, symmetric), strict=True))


def test_where_no_level_can_change_the_scales_still_lower_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, levels, scales, zeros = given = case(3)
    swept(given)
    monkeypatch.setattr(descent, "_ROUNDS", 0)
    found, fitted = descend(*given)
    assert torch.equal(found, levels) and not torch.equal(fitted, scales)
    assert (losses(weight, hessian, found, fitted, zeros) < losses(*given)).all()


@pytest.mark.parametrize("at_once", [1, 20, 1 << 24])
def test_the_scales_are_the_regression_of_the_weight_on_the_levels(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_AT_ONCE", at_once)  # one output, two and all of them in one system
    weight, hessian, levels, _scales, zeros = given = case(0)
    found = descent._regressed(*given, *state(given))[0]
    root = torch.linalg.cholesky(hessian.double()).T  # the loss is the square error of root @ (W - Ŵ)
    for output in range(OUTPUTS):
        steps = torch.block_diag(*(levels - zeros[:, None])[:, :, output].double()).T  # [K, G]
        wanted = torch.linalg.lstsq(root @ steps, root @ weight[:, output].double()).solution
        assert torch.allclose(found[:, output].double(), wanted, rtol=1e-3)


def test_a_block_without_steps_keeps_its_scale() -> None:
    _weight, _hessian, levels, scales, zeros = given = case(1)
    levels[1] = zeros[1]
    levels[:, :, 0] = zeros[:, None, 0]  # an output without any step
    found = descent._regressed(*given, *state(given))[0]
    assert torch.equal(found[1], scales[1]) and torch.equal(found[:, 0], scales[:, 0])
    assert not torch.allclose(found[0, 1:], scales[0, 1:])


def test_after_sweeps_no_change_of_a_single_level_loses_less() -> None:
    weight, hessian, levels, scales, zeros = given = case(2)
    swept(given)
    best = losses(*given)
    for block in range(BLOCKS):
        for i in range(SIZE):
            for step in (-1, 1):
                changed = levels.clone()
                changed[block, i] = (changed[block, i] + step).clamp(0, 15)
                assert (losses(weight, hessian, changed, scales, zeros) >= best * (1 - 1e-4)).all()

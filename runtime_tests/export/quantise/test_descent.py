"""Coordinate descent on a rounded weight: less loss, scales by regression, and levels that no single change betters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tp_export.quantise import descent
from tp_export.quantise.descent import descend

BLOCKS, SIZE, OUTPUTS = 3, 32, 6
INPUTS = BLOCKS * SIZE


def case(seed: int, padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a weight, a Hessian of correlated rows, and the levels, scales and zero points of rounding to nearest."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    hessian = mixed.T @ mixed / 200 + torch.eye(INPUTS)
    weight = torch.randn(INPUTS, OUTPUTS, generator=generator)
    if padding:
        weight[-padding:], hessian[-padding:], hessian[:, -padding:] = 0, 0, 0
    blocks = weight.view(BLOCKS, SIZE, OUTPUTS)
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    scales = (high - low) / 15
    zeros = (-low / scales).round()
    levels = (blocks / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return weight, hessian, levels, scales, zeros


def losses(weight: Tensor, hessian: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    missed = weight - ((levels - zeros[:, None]) * scales[:, None]).flatten(0, 1)
    return (missed * (hessian @ missed)).sum(0)


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("seed", range(4))
def test_every_output_loses_less(seed: int, padding: int) -> None:
    weight, hessian, levels, scales, zeros = case(seed, padding)
    before = losses(weight, hessian, levels, scales, zeros)
    found, fitted = descend(weight, hessian, levels, scales, zeros)
    assert found.shape == levels.shape and fitted.shape == scales.shape
    assert (found == found.round()).all() and found.min() >= 0 and found.max() <= 15
    assert (losses(weight, hessian, found, fitted, zeros) < 0.9 * before).all()
    assert not padding or torch.equal(found[-1, -padding:], levels[-1, -padding:])


def test_the_scales_are_the_regression_of_the_weight_on_the_levels() -> None:
    weight, hessian, levels, scales, zeros = case(0)
    found = descent._regressed(weight, hessian, levels - zeros[:, None], scales)
    root = torch.linalg.cholesky(hessian.double()).T  # the loss is the square error of root @ (W - Ŵ)
    for output in range(OUTPUTS):
        steps = torch.block_diag(*(levels - zeros[:, None])[:, :, output].double()).T  # [K, G]
        wanted = torch.linalg.lstsq(root @ steps, root @ weight[:, output].double()).solution
        assert torch.allclose(found[:, output].double(), wanted, rtol=1e-3)


def test_a_block_without_steps_keeps_its_scale() -> None:
    weight, hessian, levels, scales, zeros = case(1)
    levels[1] = zeros[1]
    found = descent._regressed(weight, hessian, levels - zeros[:, None], scales)
    assert torch.equal(found[1], scales[1]) and not torch.allclose(found[0], scales[0])


def test_swept_often_enough_no_change_of_a_single_level_loses_less() -> None:
    weight, hessian, levels, scales, zeros = case(2)
    values = ((levels - zeros[:, None]) * scales[:, None]).flatten(0, 1)
    pulls = hessian @ (weight - values)
    for _ in range(30):
        before = levels.clone()
        descent._sweep(hessian, levels, scales, zeros, values, pulls)
        if torch.equal(levels, before):
            break
    best = losses(weight, hessian, levels, scales, zeros)
    for block in range(BLOCKS):
        for i in range(0, SIZE, 5):
            for step in (-1, 1):
                changed = levels.clone()
                changed[block, i] = (changed[block, i] + step).clamp(0, 15)
                assert (losses(weight, hessian, changed, scales, zeros) >= best - 1e-4 * best.abs()).all()

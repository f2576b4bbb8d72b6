"""Rounding with the error passed on, against plain rounding on small matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from runtime_tests.export.compaction.layers import random_layer
from tp_export.compaction import Ridges, compact, round_entry, unrounded
from tp_export.compaction.rounding import round_lines


def coarse(lines: Tensor, step: float = 0.5) -> Tensor:
    """Round to multiples of a step."""
    return (lines / step).round() * step


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(rows: Tensor, lines: Tensor, rounded: Tensor) -> float:
    """Return |R (X - X')|^2, what the rows R see of the rounding."""
    return float((rows @ (lines - rounded)).square().sum())


@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_what_the_rows_see_changes_less_than_by_plain_rounding(alike: float) -> None:
    """The more the rows look at lines together, the more one line can make up for another."""
    rows = numbers(200, 12, seed=1) + alike * numbers(200, 1, seed=2)
    lines = numbers(12, 40)
    rounded = round_lines(lines, rows.T @ rows, 1e-3, coarse)
    assert torch.equal(rounded, coarse(rounded))
    assert loss(rows, lines, rounded) < (0.6 if alike else 1.01) * loss(rows, lines, coarse(lines))


def test_it_comes_close_to_the_best_rounding_of_all() -> None:
    """Of five numbers each of which may go up or down, the best of all 32 ways is known."""
    rows = numbers(50, 5, seed=3) @ (torch.eye(5, dtype=torch.float64) + 1)
    lines = numbers(5, 30)
    low = (lines / 0.5).floor() * 0.5
    ways = torch.tensor([[way >> i & 1 for i in range(5)] for way in range(32)]).double()[:, :, None] * 0.5
    losses = (rows @ (lines - low - ways)).square().sum(1)
    best = float(losses.min(0).values.sum())
    plain = loss(rows, lines, coarse(lines))
    found = loss(rows, lines, round_lines(lines, rows.T @ rows, 1e-6, coarse))
    assert best <= found < best + 0.25 * (plain - best)


def test_lines_that_no_row_sees_are_rounded_for_themselves() -> None:
    lines = numbers(4, 6)
    for hessian in (torch.zeros(4, 4).double(), torch.eye(4).double() * 7):
        assert torch.equal(round_lines(lines, hessian, 0.01, coarse), coarse(lines))


def test_without_rounding_nothing_changes() -> None:
    lines = numbers(7, 3)
    assert torch.equal(round_lines(lines, torch.eye(7).double() + 1, 0.01, unrounded), lines)
    keys, values = round_entry((numbers(2, 5, 4), numbers(2, 5, 4, seed=1)), unrounded)
    assert torch.equal(keys, numbers(2, 5, 4)) and torch.equal(values, numbers(2, 5, 4, seed=1))


def test_an_entry_is_rounded_by_channels_of_keys_and_by_values_of_entries() -> None:
    """A line's rounding may depend on all of its numbers, as a scale does."""

    def by_largest(lines: Tensor) -> Tensor:
        return coarse(lines, 1.0) * 0 + lines.abs().amax(-1, keepdim=True)

    keys, values = round_entry((numbers(2, 5, 4), numbers(2, 5, 4, seed=1)), by_largest)
    assert torch.equal(keys, numbers(2, 5, 4).abs().amax(1, keepdim=True).expand(2, 5, 4))
    assert torch.equal(values, numbers(2, 5, 4, seed=1).abs().amax(2, keepdim=True).expand(2, 5, 4))


@pytest.mark.parametrize("count", [6, 20])
@pytest.mark.parametrize("options", [{}, {"post_norm": True}, {"window": 26}], ids=["grouped", "post-norm", "windowed"])
def test_entries_fitted_for_a_coarse_file_lose_less_than_entries_rounded_afterwards(
    count: int, options: dict[str, object]
) -> None:
    """Also where all 20 entries of the context are kept."""
    layer = random_layer(texts=24, **options)
    rounding: Callable[[Tensor], Tensor] = partial(coarse, step=0.25)
    fitted = compact(layer.rows(), layer.context, count, layer.target(), Ridges(), rounding)
    assert all(torch.equal(part, rounding(part)) for part in fitted)
    exact = compact(layer.rows(), layer.context, count, layer.target(), Ridges())
    assert layer.error(fitted) < (0.9 if count == 6 else 0.8) * layer.error(round_entry(exact, rounding))

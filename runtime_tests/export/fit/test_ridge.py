"""The closed forms compared with their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.export.rows import fit_affine
from tp_export.fit.ridge import Moments, top_directions


def rows(seed: int, count: int, inputs: int = 12, outputs: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Return correlated inputs of very different scales, like residual streams, and noisy targets."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(count, inputs, generator=g, dtype=torch.float64) * torch.logspace(
        -1, 1, inputs, dtype=torch.float64
    )
    a = a @ torch.randn(inputs, inputs, generator=g, dtype=torch.float64) + 3
    d = a @ torch.randn(inputs, outputs, generator=g, dtype=torch.float64)
    return a, d + torch.randn(count, outputs, generator=g, dtype=torch.float64)


def definition(a: torch.Tensor, d: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return M = D^T A (A^T A + l I)^-1 on centred rows, computed directly from the formula."""
    a, d = a - a.mean(0), d - d.mean(0)
    gram = a.T @ a
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=a.dtype)
    return d.T @ a @ torch.linalg.inv(gram + penalty)


@given(seed=st.integers(0, 1000), count=st.integers(2, 40), ridge=st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_primal_and_dual_are_the_ridge_solution(seed: int, count: int, ridge: float) -> None:
    a, d = rows(seed, count)
    fit = fit_affine(a, d, ridge)
    wanted = definition(a, d, ridge)
    assert torch.allclose(fit.matrix, wanted, rtol=1e-6, atol=1e-8 * wanted.abs().max().item())


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 1000), with_sink=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rows_in_batches_give_the_same_fit(cuts: list[int], seed: int, with_sink: bool) -> None:
    a, d = rows(seed, sum(cuts) + 1)
    sink = a[0] if with_sink else None
    whole, moments = fit_affine(a[1:], d[1:], 0.5, sink), Moments(sink)
    for part_a, part_d in zip(a[1:].split(cuts), d[1:].split(cuts), strict=True):
        moments.add(part_a, part_d)
    fit = moments.solve(0.5)
    for name in ("matrix", "energy", "mean_in", "mean_out"):
        wanted = getattr(whole, name)
        assert torch.allclose(getattr(fit, name), wanted, rtol=1e-6, atol=1e-7 * wanted.abs().max().item())


def test_memory_does_not_grow_with_rows() -> None:
    a, d = rows(0, 100)
    moments = Moments()
    for _ in range(20):
        moments.add(a, d)
        stored = sum(x.numel() + y.numel() for x, y in moments._rows)
        assert stored <= 12 * (12 + 7)


@pytest.mark.parametrize("count", [8, 50])
def test_energy_is_the_output_metric(count: int) -> None:
    a, d = rows(1, count)
    fit = fit_affine(a, d, 0.5)
    centred = a - a.mean(0)
    gram = centred.T @ centred
    gram += 0.5 * gram.diagonal().mean() * torch.eye(len(gram), dtype=a.dtype)
    assert torch.allclose(fit.energy, fit.matrix @ gram @ fit.matrix.T, rtol=1e-6)


def test_truncation_gives_the_best_map_of_its_rank() -> None:
    """No other map of that rank has a lower ridge loss, and the truncated SVD of M has a higher one."""
    a, d = rows(2, 60)
    ridge, rank = 1.0, 2
    fit = fit_affine(a, d, ridge)
    a, d = a - a.mean(0), d - d.mean(0)
    penalty = ridge * a.square().sum() / a.shape[1]

    def loss(m: torch.Tensor) -> float:
        return float((a @ m.T - d).square().sum() + penalty * m.square().sum())

    directions = top_directions(fit.energy, rank)
    ours = loss(directions @ directions.T @ fit.matrix)
    u, s, vt = torch.linalg.svd(fit.matrix)
    assert ours < loss(u[:, :rank] * s[:rank] @ vt[:rank])
    for seed in range(20):
        other = torch.linalg.qr(torch.randn(7, rank, generator=torch.Generator().manual_seed(seed), dtype=a.dtype))[0]
        assert ours <= loss(other @ other.T @ fit.matrix)


def test_directions_are_in_order_of_energy() -> None:
    a, d = rows(3, 60)
    fit = fit_affine(a, d, 1.0)
    directions = top_directions(fit.energy, 7)
    energies = (directions * (fit.energy @ directions)).sum(0)
    assert torch.all(energies[:-1] >= energies[1:])
    assert torch.allclose(directions.T @ directions, torch.eye(7, dtype=a.dtype), atol=1e-10)


@pytest.mark.parametrize("count", [8, 50])
def test_the_map_is_zero_on_the_sink(count: int) -> None:
    a, d = rows(4, count)
    sink = torch.randn(12, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 1e4
    fit = fit_affine(a, d, 1.0, sink)
    assert (fit.matrix @ sink).norm() < 1e-9 * fit.matrix.norm() * sink.norm()
    assert fit.matrix.norm() > 0

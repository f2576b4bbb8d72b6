"""The steps of compaction, each against a direct dense solution of its problem in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from tp_export.compaction import selection
from tp_export.compaction.joint import fit_joint
from tp_export.compaction.mass import fold, fold_direction, mass_factors
from tp_export.compaction.selection import select_forward, select_seen
from tp_export.compaction.values import fit_values

LEAST, MOST = 0.05, 200.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_shares(rows: int, entries: int, seed: int = 0, sharpness: float = 1.5) -> Tensor:
    """Return shares [rows, entries], whose rows sum to less than 1."""
    logits = sharpness * torch.randn(rows, entries + 1, generator=generator(seed), dtype=torch.float64)
    return logits.softmax(-1)[:, :-1]


# -- selection -----------------------------------------------------------------------------------------------


def test_the_entries_with_the_largest_weighted_mean_square_share_are_kept_in_order() -> None:
    shares = random_shares(30, 12)
    weight = torch.rand(30, generator=generator(1), dtype=torch.float64)
    score = [sum(float(weight[i] * shares[i, j] ** 2) for i in range(30)) for j in range(12)]
    for count in (1, 4, 12):
        assert select_seen(shares, weight, count).tolist() == sorted(sorted(range(12), key=lambda j: -score[j])[:count])


def test_what_some_rows_look_at_closely_is_kept_before_what_all_rows_look_at_a_little() -> None:
    shares = torch.full((100, 2), 0.1, dtype=torch.float64)
    shares[:, 1] = 0
    shares[:4, 1] = 0.9
    ones = torch.ones(100).double()
    assert shares[:, 0].mean() > shares[:, 1].mean() and select_seen(shares, ones, 1).tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_each_forward_step_takes_the_entry_that_leaves_the_least_unexplained(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_CANDIDATES", 15)  # all of them
    g = generator(seed + 100)
    shares = random_shares(80, 15, seed, sharpness=2.5) * torch.rand(80, 1, generator=g, dtype=torch.float64)
    weight = torch.rand(80, generator=g, dtype=torch.float64)
    values = torch.randn(15, 4, generator=g, dtype=torch.float64)
    root = weight.sqrt()[:, None]
    output, mass = root * (shares @ values), root * shares.sum(1, keepdim=True)
    wanted = torch.cat([output, mass * output.norm() / mass.norm()], 1)

    def unexplained(kept: list[int]) -> float:
        part = root * shares[:, kept]
        return float((wanted - part @ torch.linalg.lstsq(part, wanted).solution).square().sum())

    kept: list[int] = []
    for count in range(1, 6):
        kept.append(min(set(range(15)) - set(kept), key=lambda j: unexplained([*kept, j])))
        assert select_forward(shares, weight, values, count).tolist() == sorted(kept)


def test_forward_selection_keeps_one_of_two_entries_that_the_same_rows_look_at() -> None:
    shares = torch.zeros(100, 6, dtype=torch.float64)
    shares[:90, 0] = shares[:90, 1] = 0.4
    shares[90:, 2] = 0.8
    ones, values = torch.ones(100).double(), torch.eye(6).double()
    assert select_seen(shares, ones, 2).tolist() == [0, 1]
    assert select_forward(shares, ones, values, 2).tolist() in ([0, 2], [1, 2])
    assert len(set(select_forward(shares, ones, values, 6).tolist())) == 6  # also where nothing is left to explain
    assert len(set(select_forward(0 * shares, ones, values, 4).tolist())) == 4  # a window hides them all


# -- mass ----------------------------------------------------------------------------------------------------


def problem(shares: Tensor, kept: list[int], ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrix A and the vector b of the gradient A w - b, and the factors that are found."""
    part, mass = shares[:, kept], shares.sum(1)
    gram, moment = part.T @ part, part.T @ mass
    absolute = ridge * float(gram.diagonal().mean())
    found = mass_factors(gram, moment, ridge)
    return gram + absolute * torch.eye(len(kept)).double(), moment + absolute, found


def by_active_sets(a: Tensor, b: Tensor) -> Tensor:
    """Return the minimum of w A w / 2 - b w within the bounds: the best of every choice of factors at a bound."""
    best, lowest = torch.ones_like(b), torch.inf
    for choice in product((None, LEAST, MOST), repeat=len(b)):
        w = torch.tensor([1.0 if bound is None else bound for bound in choice], dtype=torch.float64)
        free = torch.tensor([bound is None for bound in choice])
        if free.any():
            w[free] = torch.linalg.solve(a[free][:, free], b[free] - a[free][:, ~free] @ w[~free])
        if (w < LEAST - 1e-12).any() or (w > MOST + 1e-12).any():
            continue
        value = float(0.5 * w @ a @ w - b @ w)
        if value < lowest:
            best, lowest = w, value
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [1e-4, 1e-2])
def test_mass_factors_are_the_best_within_their_bounds(seed: int, ridge: float) -> None:
    a, b, found = problem(random_shares(60, 15, seed), [0, 3, 7, 8], ridge)
    assert torch.allclose(found, by_active_sets(a, b), rtol=1e-4)


def test_factors_at_a_bound_are_among_the_best() -> None:
    g = generator(5)
    part = torch.rand(80, 3, generator=g).double()
    part[:20, 1] = part[20:, 2] = 0
    part[:, 2] *= 1e-4
    # Without bounds, the factors would be 3, -2 and 10000.
    a, b = part.T @ part, part.T @ (part @ torch.tensor([3.0, -2.0, 10_000.0]).double())
    wanted = by_active_sets(a, b)
    assert float(wanted[2]) == MOST and float(wanted[1]) == LEAST
    assert torch.allclose(mass_factors(a, b, 0.0), wanted, rtol=1e-3)


@pytest.mark.parametrize("entries", [24, 96])
def test_many_factors_satisfy_the_conditions_of_a_minimum(entries: int) -> None:
    """The gradient is zero inside the bounds, and points outwards at them (Karush, Kuhn and Tucker)."""
    shares = random_shares(600, 200, sharpness=3.0)
    shares[:, 1] = shares[:, 0] * 1.0001  # two entries that nothing tells apart
    a, b, found = problem(shares, list(range(entries)), 1e-2)
    assert (found >= LEAST - 1e-9).all() and (found <= MOST + 1e-9).all()
    gradient = (a @ found - b) / a.diagonal()  # how far each factor alone would still move
    inside = (found > LEAST * 1.001) & (found < MOST * 0.999)
    assert inside.any() and float((gradient[inside].abs() / found[inside]).max()) < 1e-3
    assert (gradient[found <= LEAST * 1.001] > -1e-4).all() and (gradient[found >= MOST * 0.999] < 1e-4).all()


def test_entries_that_no_row_sees_keep_their_keys() -> None:
    """A window can hide all entries from every row, and shares can be too small for float32."""
    zero = torch.zeros(3, 3)
    assert mass_factors(zero, zero[0], 1e-2).tolist() == [1, 1, 1]
    query = torch.randn(20, 4, generator=generator())
    direction = fold_direction(query, torch.zeros(20), 0.5)
    keys = torch.randn(3, 4, generator=generator(1))
    assert torch.equal(fold(keys, torch.ones(3), direction), keys)
    values = torch.randn(3, 4, generator=generator(2))
    assert torch.equal(fit_values(torch.zeros(20, 3), torch.ones(20, 4), values, torch.ones(20), 1e-2), values)
    shares, rest = torch.zeros(20, 2, 3), torch.ones(20, 6)
    assert fit_joint(shares, rest, torch.ones(6, 8), 1, torch.ones(20), 1e-2).abs().max() == 0


# -- fold ----------------------------------------------------------------------------------------------------


def test_the_fold_direction_is_the_weighted_ridge_regression_of_one_on_the_queries() -> None:
    query = torch.randn(50, 6, generator=generator(), dtype=torch.float64) + 1
    attention = torch.rand(50, generator=generator(1), dtype=torch.float64)
    rows, root = 0.4 * query, attention.sqrt()[:, None]
    ridge = 1e-2 * float((rows.T * attention @ rows).diagonal().mean())
    stacked = torch.cat([root * rows, ridge**0.5 * torch.eye(6).double()])
    wanted = torch.linalg.lstsq(stacked, torch.cat([root[:, 0], torch.zeros(6).double()])[:, None]).solution[:, 0]
    assert torch.allclose(fold_direction(query, attention, 0.4), wanted)


def test_where_the_queries_share_a_direction_the_fold_is_the_bias() -> None:
    """If some u has scale * q u = 1 in every row, folded keys have the logits s + log w."""
    query = torch.randn(200, 8, generator=generator(), dtype=torch.float64)
    query[:, 3] = 40.0  # the same in every row, and far larger than the ridge
    scale, keys = 8**-0.5, torch.randn(5, 8, generator=generator(1), dtype=torch.float64)
    factors = torch.tensor([0.05, 0.5, 1.0, 3.0, 200.0], dtype=torch.float64)
    direction = fold_direction(query, torch.ones(200).double(), scale)
    before, after = (scale * query @ part.T for part in (keys, fold(keys, factors, direction)))
    assert torch.allclose(after - before, factors.log().expand(200, 5), atol=5e-2)


# -- values --------------------------------------------------------------------------------------------------


def test_values_are_the_stacked_least_squares_with_a_pull_to_the_contexts_own() -> None:
    shares, g = random_shares(40, 6), generator(3)
    target = torch.randn(40, 5, generator=g, dtype=torch.float64)
    values = torch.randn(6, 5, generator=g, dtype=torch.float64)
    weight = torch.rand(40, generator=g, dtype=torch.float64)
    root = weight.sqrt()[:, None]
    pull = (0.3 * float((shares.T * weight @ shares).diagonal().mean())) ** 0.5 * torch.eye(6).double()
    wanted = torch.linalg.lstsq(torch.cat([root * shares, pull]), torch.cat([root * target, pull @ values])).solution
    assert torch.allclose(fit_values(shares, target - shares @ values, values, weight, 0.3), wanted)


# -- joint values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [False, True])
def test_joint_values_solve_the_normal_equations_of_all_heads_at_once(heads: int, kv_heads: int, lengths: bool) -> None:
    rows, count, size, width, g = 120, 5, 4, 30, generator(heads)
    shares = torch.stack([random_shares(rows, count, 10 + head, 2.5) for head in range(heads)], 1)
    rest = torch.randn(rows, width, generator=g, dtype=torch.float64)
    projection = torch.randn(width, heads * size, generator=g, dtype=torch.float64)
    weight = 0.5 + torch.rand(rows, generator=g, dtype=torch.float64)
    if lengths:  # behind a post-norm, shares and what is missing are divided by the length of the branch
        shares = shares / (0.5 + torch.rand(rows, 1, 1, generator=g, dtype=torch.float64))
    # One column for each component of each entry of each key/value head: what it adds to the residual stream.
    columns = torch.zeros(rows, width, kv_heads, count, size).double()
    blocks = projection.view(width, heads, size)
    for head in range(heads):
        own = head // (heads // kv_heads)
        columns[:, :, own] += shares[:, head, None, :, None] * blocks[None, :, head, None, :]
    design = (weight.sqrt()[:, None, None] * columns.flatten(2)).flatten(0, 1)
    missing = (weight.sqrt()[:, None] * rest).flatten()
    for ridge in (1e-6, 0.05):
        gram = design.T @ design
        pull = ridge * float(gram.diagonal().mean()) * torch.eye(len(gram)).double()
        wanted = torch.linalg.solve(gram + pull, design.T @ missing).view(kv_heads, count, size)
        found = fit_joint(shares, rest, projection, kv_heads, weight, ridge)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4, ridge

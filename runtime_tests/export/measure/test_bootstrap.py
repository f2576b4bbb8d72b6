"""The bootstrap standard error of a ratio of sums, compared with closed cases."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tp_export.measure import ratio_error


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_count() -> None:
    values = np.random.default_rng(0).random(60)
    assert ratio_error(values, np.ones(60)) == pytest.approx(values.std() / 60**0.5, rel=0.07)


def test_the_error_of_a_ratio_is_that_of_all_possible_draws() -> None:
    top, bottom = np.array([1.0, 2.0, 7.0]), np.array([4.0, 1.0, 9.0])
    draws = [list(draw) for draw in product(range(3), repeat=3)]
    ratios = [top[draw].sum() / bottom[draw].sum() for draw in draws]
    assert ratio_error(top, bottom, draws=100_000) == pytest.approx(np.std(ratios), rel=0.01)


def test_queries_of_one_ratio_have_no_error() -> None:
    assert ratio_error([1, 2, 3], [2, 4, 6]) == pytest.approx(0, abs=1e-12)


def test_the_error_is_the_same_in_every_run() -> None:
    assert ratio_error([1, 2, 4], [3, 3, 5]) == ratio_error([1, 2, 4], [3, 3, 5])


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1], [2]), ([1, 0, 0], [2, 0, 0])])
def test_too_few_queries_give_no_error(top: list[float], bottom: list[float]) -> None:
    assert ratio_error(top, bottom) is None


def test_a_draw_without_a_denominator_is_left_out() -> None:
    """Of five draws of two in three queries with denominators 1, 1 and 0, some have only the third query."""
    assert np.isfinite(ratio_error([1, 0, 0], [1, 1, 0]) or np.nan)

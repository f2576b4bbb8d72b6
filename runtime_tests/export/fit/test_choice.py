"""The search for the smallest file that reaches a target, with a fit that is a formula of the entries and the rank."""

from __future__ import annotations

from typing import Any

import pytest

from tp_export.fit import ALL, Recipe, Target, default_entries
from tp_export.fit.choice import Trial, choose, most_entries, selection_size
from tp_runtime.errors import CalibrationError

CONTEXT, BYTES = 400, 1000  # entries of the context, and bytes of an entry


class Sized:
    """Stands in for a patch, whose size is all that the search reads."""

    def __init__(self, size: int) -> None:
        self.nbytes = size


class Fits:
    """Fits by formula: a share of 1 - 1 / (1 + n / 8) for n entries, less in four bits, more with weights."""

    def __init__(self, weights: float = 0.1, four_bits: float = 1.0) -> None:
        self.weights, self.four_bits, self.made = weights, four_bits, list[Recipe]()

    def __call__(self, recipe: Recipe) -> Trial:
        self.made.append(recipe)
        gap = 1.0 if recipe.prefix == ALL else 1 - 1 / (1 + recipe.prefix / 8)
        with_weights = recipe.method == "output"
        if with_weights:
            gap += self.weights * (1 - gap)
        if recipe.dtype == "i4":
            gap *= self.four_bits
        return Trial(recipe, Sized(size_of(recipe.prefix, recipe.dtype) + 5000 * with_weights), gap)  # type: ignore[arg-type]


def size_of(entries: int, dtype: str = "i8") -> int:
    """Return the bytes of a file of entries."""
    return BYTES * min(entries, CONTEXT) // (2 if dtype == "i4" else 1)


def size(dtype: str, entries: int) -> int:
    """Return the bytes of a file of entries, for the search."""
    return size_of(entries, dtype)


def eight_bits(gap: float | None = None, **options: Any) -> Target:
    """Return a target whose search has one dtype to choose from."""
    return Target(gap, dtypes=("i8",), **options)


def search(target: Target, fits: Fits) -> Trial:
    """Search with the fit by formula."""
    return choose(Recipe(), target, CONTEXT, size, fits)


def test_the_search_finds_the_smallest_file_that_reaches_the_target() -> None:
    fits = Fits()
    found = search(eight_bits(0.9), fits)
    assert found.size == size_of(96)  # 64 entries reach 0.889, and with weights 0.8999
    assert found.gap >= 0.9
    assert len(fits.made) <= 6


def test_fewer_entries_with_weights_win_where_they_reach_the_target_in_fewer_bytes() -> None:
    found = search(eight_bits(0.9), Fits(weights=0.5))
    assert found.size == size_of(64) + 5000
    assert found.gap >= 0.9


def test_all_entries_reach_every_target() -> None:
    assert search(eight_bits(1.0), Fits()).size == size_of(ALL)


def test_a_target_that_no_file_of_the_size_reaches_names_the_best_found() -> None:
    with pytest.raises(CalibrationError, match="no file reaches the target") as error:
        search(eight_bits(0.99, max_bytes=size_of(96)), Fits())
    assert error.value.field == "--target"
    assert "0.923 in 96000 bytes" in str(error.value)
    assert "--best" in str(error.value)


def test_the_best_file_will_do_if_asked_for() -> None:
    assert search(eight_bits(0.99, max_bytes=size_of(96), best=True), Fits()).size == size_of(96)


def test_a_size_without_a_target_takes_as_many_entries_as_fit() -> None:
    for size_in_bytes, entries in {size_of(37): 37, 123_456: 123, size_of(CONTEXT): ALL}.items():
        found = most_entries(Recipe(), CONTEXT, size, eight_bits(max_bytes=size_in_bytes))
        assert (found.method, found.prefix, found.dtype) == ("prefix", entries, "i8")


@pytest.mark.parametrize(
    ("most", "entries", "dtype"),
    [
        (size_of(37), 74, "i4"),
        (size_of(200), ALL, "i4"),
        (size_of(299), ALL, "i4"),
        (size_of(300), 300, "i8"),
        (size_of(ALL), ALL, "i8"),
    ],
)
def test_a_size_without_a_target_takes_eight_bits_where_nearly_all_entries_fit_and_otherwise_four(
    most: int, entries: int, dtype: str
) -> None:
    found = most_entries(Recipe(), CONTEXT, size, Target(max_bytes=most))
    assert (found.prefix, found.dtype) == (entries, dtype)


def test_the_search_takes_four_bits_first() -> None:
    found = search(Target(0.9), Fits())
    assert (found.recipe.prefix, found.recipe.dtype) == (96, "i4")


def test_the_search_goes_on_in_eight_bits_where_four_do_not_reach_the_target() -> None:
    fits = Fits(weights=0.0, four_bits=0.95)
    found = search(Target(0.96), fits)
    assert (found.recipe.prefix, found.recipe.dtype) == (384, "i8")
    assert all(recipe.prefix >= 300 for recipe in fits.made if recipe.dtype == "i8")  # fewer lose more than i4


def test_where_few_entries_are_smaller_in_eight_bits_these_are_taken() -> None:
    """Four bits have more numbers and tensors beside the entries."""

    def with_overhead(dtype: str, entries: int) -> int:
        return size(dtype, entries) + (3000 if dtype == "i4" else 0)

    found = most_entries(Recipe(), CONTEXT, with_overhead, Target(max_bytes=2500))
    assert (found.prefix, found.dtype) == (2, "i8")
    with pytest.raises(CalibrationError, match="nothing that small"):
        most_entries(Recipe(), CONTEXT, with_overhead, Target(max_bytes=900))


def test_a_size_below_the_smallest_file_is_refused() -> None:
    with pytest.raises(CalibrationError, match="nothing that small"):
        most_entries(Recipe(), CONTEXT, size, eight_bits(max_bytes=100))
    with pytest.raises(CalibrationError, match="nothing that small"):
        search(eight_bits(0.5, max_bytes=100), Fits())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_target_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(CalibrationError, match="the target is not a share"):
        Target(share)


def test_a_size_of_no_bytes_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the size is not positive"):
        Target(0.5, max_bytes=0)


def test_the_search_keeps_a_fifth_of_the_queries_and_needs_enough_of_them() -> None:
    assert selection_size(["q"] * 64) == 12
    assert selection_size(["q"] * 16) == 8
    with pytest.raises(CalibrationError, match="too few queries"):
        selection_size(["q"] * 15)


def test_a_short_context_keeps_all_its_entries_and_a_long_one_a_fifth_or_192() -> None:
    assert default_entries(23) == default_entries(192) == ALL
    assert default_entries(400) == default_entries(900) == 192
    assert default_entries(2000) == 400

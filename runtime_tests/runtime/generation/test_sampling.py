"""Sampling: its distribution, its seed, and an error that names every bad value.

The tests in runtime_tests/export/parity compare the candidates with those of transformers' own processors.
"""

from __future__ import annotations

from dataclasses import fields
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.generation import Sampler, Sampling
from tp_runtime.generation.scores import candidates

VOCAB = 2000


def row(seed: int, spread: float = 3.0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, vocab).astype(np.float32)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.pick(logits, [], draw) for draw in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.012)


def test_equal_seeds_repeat_the_draws_and_no_seed_does_not() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, top_p=0.95, seed=seed))
        return [sampler.pick(row(i), [], i) for i in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_the_same_draw_gives_the_same_id_in_any_order() -> None:
    """A step that failed after its draw draws again, and gets what it would have got."""
    sampling = Sampling(temperature=1.5, seed=7)
    sampler, numbers = Sampler(sampling), np.random.default_rng(7).random(30)
    once = [sampler.pick(row(i), [], i) for i in range(30)]
    again = Sampler(sampling)
    for i in (0, 1, 1, 0, 29, 3, 4, 4, 5, 2, 28, 29):
        assert again.pick(row(i), [], i) == once[i]
        assert again._uniform(i) == numbers[i]


def test_greedy_sampling_takes_the_lowest_id_of_equal_logits() -> None:
    logits = np.array([1, 4, 4, -np.inf], dtype=np.float32)
    assert Sampler(Sampling()).pick(logits, [], 0) == 1
    assert Sampler(Sampling(temperature=1e-300)).pick(np.array([1, 2, 1], dtype=np.float32), [], 0) == 1


def test_greedy_sampling_applies_the_penalty_once_per_token() -> None:
    logits = np.array([3.0, 2.0, -1.0], dtype=np.float32)
    assert Sampler(Sampling(repetition_penalty=1.4)).pick(logits, [0, 0, 0, 0], 0) == 0
    assert Sampler(Sampling(repetition_penalty=1.6)).pick(logits, [0], 0) == 1
    assert logits.tolist() == [3.0, 2.0, -1.0]


@pytest.mark.parametrize("size", [50, 256, 257, 5000])
def test_the_nucleus_of_equal_logits_is_the_lowest_ids(size: int) -> None:
    """This also holds if the nucleus is wider than the part that is sorted first."""
    kept, _ = candidates(np.zeros(size, dtype=np.float32), Sampling(temperature=1.0, top_p=0.5))
    assert kept.tolist() == list(range(len(kept)))
    assert abs(len(kept) - size / 2) <= 1


def test_half_precision_logits_can_be_sampled() -> None:
    logits = row(3).astype(np.float16)
    assert Sampler(Sampling(repetition_penalty=1.1)).pick(logits, [1], 0) == int(logits.argmax())
    assert 0 <= Sampler(Sampling(temperature=1.0)).pick(logits, [], 0) < VOCAB


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_handled(temperature: float) -> None:
    inf, nan = np.inf, np.nan
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    for values, want in (([-inf, 1, -inf], 1), ([nan, 1, -inf], 1), ([1, nan, inf], 2)):
        assert sampler.pick(np.array(values, dtype=np.float32), [], 0) == want
    for values in ([nan] * 3, [-inf] * 3, [inf, nan, -inf]):
        with pytest.raises(ModelFormatError, match="no logit is finite"):
            sampler.pick(np.array(values, dtype=np.float32), [], 0)


@pytest.mark.parametrize("history", [[-1], [VOCAB]])
def test_a_history_outside_the_vocabulary_is_refused(history: list[int]) -> None:
    with pytest.raises(RequestError, match="history"):
        Sampler(Sampling(repetition_penalty=1.1)).pick(row(0), history, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", v) for v in (-0.1, float("nan"), float("inf"), "1", None, True)),
        *(("top_k", v) for v in (-1, 1.5, 4.0, "4", None, False)),
        *(("top_p", v) for v in (0, 0.0, -0.1, 1.01, float("nan"), "1", None, True)),
        *(("min_p", v) for v in (-0.1, 1, 1.0, float("nan"), "0", None, False)),
        *(("repetition_penalty", v) for v in (0, -1.0, float("nan"), float("inf"), "1", None, True)),
        *(("seed", v) for v in (-1, 1.0, "1", True)),
        *(("frequency_penalty", v) for v in (-2.1, 3, float("nan"), "1", None, True)),
        *(("presence_penalty", v) for v in (-2.1, 3, float("nan"), "1", None, True)),
        *(("min_new_tokens", v) for v in (-1, 1.5, "4", None, False)),
        *(("logit_bias", v) for v in (None, [1], "x")),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert error.value.field == field and error.value.got == repr(value) and error.value.wanted


def test_good_values_are_accepted() -> None:
    Sampling(1, 0, 1, 0, 1, None)
    Sampling(np.float32(0.7), np.int64(5), 0.5, 0.99, 1.2, np.int64(3))  # type: ignore[arg-type]


def test_numbers_are_stored_as_the_floats_and_ints_that_the_choice_computes_with() -> None:
    """A Fraction in the penalty would otherwise make numpy compute with Python objects."""
    sampling = Sampling(Fraction(1, 2), np.int64(5), Fraction(1, 4), np.float64(0.5), Fraction(3, 2), np.int64(3))  # type: ignore[arg-type]
    assert sampling == Sampling(0.5, 5, 0.25, 0.5, 1.5, 3)
    for field in fields(Sampling):
        if field.name == "logit_bias":
            continue
        assert type(getattr(sampling, field.name)) in (int, float)
    assert Sampler(Sampling(1.0, top_k=10**400, seed=10**400)).pick(row(0), [], 0) in range(VOCAB)


_SETTINGS = [setting.name for setting in fields(Sampling)]
_NOT_NUMBERS = [Decimal("0.5"), 1j, np.bool_(True), np.array(0.5), np.array([0.1, 0.2]), b"1", [1], float("nan")]


@pytest.mark.parametrize("field", _SETTINGS)
@pytest.mark.parametrize("value", [*_NOT_NUMBERS, -(10**400), -(10**5000)], ids=lambda value: f"{type(value).__name__}")
def test_what_is_no_number_or_too_large_is_refused_with_the_request(field: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert error.value.field == field and len(str(error.value)) < 700


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize(
    "value",
    [10**400, Fraction(10**400), 10**5000, np.longdouble("1e4000")],
    ids=["int", "Fraction", "digits", "longdouble"],
)
def test_a_number_that_no_float_holds_is_refused(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{field}: the sampling value is not valid"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_a_number_that_rounds_to_a_forbidden_zero_is_refused() -> None:
    for field in ("top_p", "repetition_penalty"):
        with pytest.raises(RequestError):
            Sampling(**{field: Fraction(1, 10**400)})  # type: ignore[arg-type]
    assert Sampling(temperature=Fraction(1, 10**400)) == Sampling()  # type: ignore[arg-type]


class _Broken(float):
    def __float__(self) -> float:
        raise KeyError("not today")


def test_a_number_that_cannot_be_converted_is_refused() -> None:
    with pytest.raises(RequestError):
        Sampling(temperature=_Broken(0.5))

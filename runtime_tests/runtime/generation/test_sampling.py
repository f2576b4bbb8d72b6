"""Sampling: its distribution, its seed, and an error that names every bad value.

The tests in runtime_tests/export/parity compare the candidates with those of transformers' own processors.
"""

from __future__ import annotations

import numpy as np
import pytest

from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.generation import Sampler, Sampling
from tp_runtime.generation.sampling import candidates

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
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert error.value.field == field and error.value.got == repr(value) and error.value.wanted


def test_good_values_are_accepted() -> None:
    Sampling(1, 0, 1, 0, 1, None)
    Sampling(np.float32(0.7), np.int64(5), 0.5, 0.99, 1.2, np.int64(3))  # type: ignore[arg-type]

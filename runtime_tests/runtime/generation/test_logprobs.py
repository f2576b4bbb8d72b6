"""Log-probabilities of picked tokens: of the model's logits, and of what the token was picked from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tp_runtime.errors import RequestError
from tp_runtime.generation import Sampler, Sampling, WantedLogprobs
from tp_runtime.generation.logprobs import LogprobsMode

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3


def record(top: int, mode: LogprobsMode = "raw", logits: np.ndarray = LOGITS, **settings: Any) -> Any:
    sampler = Sampler(Sampling(**settings), logprobs=WantedLogprobs(top, mode))
    sampler.pick(logits, [2], 0)
    (found,) = sampler.logprobs
    return found


def test_raw_logprobs_are_those_of_the_model_whatever_the_settings() -> None:
    found = record(3, logit_bias={0: 100})
    assert found.token == 0
    assert found.logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in found.top] == [1, 3, 2]
    np.testing.assert_allclose([logprob for _, logprob in found.top], np.log([0.4, 0.3, 0.2]), atol=1e-6)


def test_processed_logprobs_are_those_of_what_was_picked_from() -> None:
    greedy = record(1, "processed", logit_bias={0: 100})
    assert greedy.top == ((0, pytest.approx(0.0, abs=1e-6)),)
    sampled = record(9, "processed", temperature=0.5, top_k=2, seed=0)
    assert dict(sampled.top) == pytest.approx({1: np.log(0.16 / 0.25), 3: np.log(0.09 / 0.25)}, abs=1e-5)
    assert sampled.logprob == dict(sampled.top)[sampled.token]


def test_equal_logits_are_listed_by_id_and_nan_counts_as_impossible() -> None:
    assert [token for token, _ in record(2, logits=np.zeros(5, np.float32)).top] == [0, 1]
    found = record(4, logits=np.array([np.nan, 1, -np.inf, 1], np.float32))
    assert dict(found.top) == {1: pytest.approx(np.log(0.5)), 3: pytest.approx(np.log(0.5)), 0: -np.inf, 2: -np.inf}


def test_a_step_that_is_repeated_replaces_its_record() -> None:
    sampler = Sampler(logprobs=WantedLogprobs(0))
    for draw in (0, 1, 1, 2):
        sampler.pick(LOGITS, [0] * (draw + 1), draw)
    assert len(sampler.logprobs) == 3


def test_nothing_is_recorded_unless_it_is_wanted() -> None:
    sampler = Sampler()
    sampler.pick(LOGITS, [0], 0)
    assert sampler.logprobs == () and sampler.takes_largest
    assert not Sampler(logprobs=WantedLogprobs(0)).takes_largest


@pytest.mark.parametrize(
    ("top", "mode", "field"),
    [(-1, "raw", "logprobs"), (True, "raw", "logprobs"), (1.5, "raw", "logprobs"), (1, "both", "logprobs_mode")],
)
def test_bad_settings_are_refused_by_name(top: Any, mode: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        WantedLogprobs(top, mode)
    assert error.value.field == field

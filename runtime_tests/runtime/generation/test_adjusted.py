"""What changes logits before temperature: bias, penalties and a smallest number of new tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tp_runtime.errors import RequestError
from tp_runtime.generation import Sampler, Sampling
from tp_runtime.generation.scores import adjusted

LOGITS = np.array([0.5, -0.5, 2.0, 1.0, 0.0], np.float32)
PROMPT, COMPLETION = [0, 0, 1], [3, 3, 2]


def scores(eos_ids: tuple[int, ...] = (), **settings: Any) -> list[float]:
    before = LOGITS.copy()
    found = adjusted(LOGITS, [*PROMPT, *COMPLETION], len(COMPLETION), Sampling(**settings), eos_ids)
    assert (before == LOGITS).all()
    return found.tolist()  # type: ignore[no-any-return]


def test_the_penalties_count_the_completion_and_not_the_prompt() -> None:
    assert scores(frequency_penalty=0.25) == [0.5, -0.5, 1.75, 0.5, 0.0]
    assert scores(presence_penalty=0.25) == [0.5, -0.5, 1.75, 0.75, 0.0]
    assert scores(presence_penalty=-0.5, frequency_penalty=1) == [0.5, -0.5, 1.5, -0.5, 0.0]


def test_the_bias_comes_before_the_repetition_penalty() -> None:
    assert scores(logit_bias={0: 1.5, "4": -100}, repetition_penalty=2.0) == [1.0, -1.0, 1.0, 0.5, -100.0]


@pytest.mark.parametrize(("bias", "field"), [({1: 101}, "logit_bias[1]"), ({1: "2"}, "logit_bias[1]")])
def test_a_bias_out_of_range_is_refused_by_its_id(bias: dict[int, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        Sampling(logit_bias=bias)
    assert error.value.field == field


@pytest.mark.parametrize("key", [-1, "a", 1.5, True, "1.0", "-1"])
def test_a_key_that_is_no_id_is_refused(key: Any) -> None:
    with pytest.raises(RequestError, match="the key is not a token id") as error:
        Sampling(logit_bias={key: 1})
    assert error.value.field == "logit_bias" and error.value.got == repr(key)


def test_an_id_with_two_biases_is_refused() -> None:
    with pytest.raises(RequestError, match="two biases"):
        Sampling(logit_bias={1: 1, "1": 2})  # type: ignore[dict-item]


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^logit_bias: the id is outside the vocabulary; got 7"):
        Sampler(Sampling(logit_bias={7: 1})).require_vocabulary(7)


def test_no_end_is_picked_before_the_smallest_number_of_tokens() -> None:
    ending = np.array([0.0, 9.0, 8.0, 1.0], np.float32)
    sampler = Sampler(Sampling(min_new_tokens=2), eos_ids=frozenset({1, 2, 99}))
    assert [sampler.pick(ending, [0] * (1 + draw), draw) for draw in range(4)] == [3, 3, 1, 1]

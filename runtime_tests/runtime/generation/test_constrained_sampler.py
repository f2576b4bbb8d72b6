"""The sampler under a constraint, which it asks about its pick and masks only if the pick is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from tp_runtime.generation import Sampler, Sampling, WantedLogprobs

VOCAB = 40
LOGITS = np.random.default_rng(0).normal(0, 1, VOCAB).astype(np.float32)


class Fixed:
    """Allows the same ids at every place, or forces the ids of a list, one after the other."""

    def __init__(self, ids: Sequence[int], forced: Sequence[int] = ()) -> None:
        self.ids, self.script = set(ids), list(forced)
        self.followed: list[list[int]] = []
        self.masks = 0

    def follow(self, completion: Sequence[int]) -> None:
        self.followed.append(list(completion))

    def allows(self, token: int) -> bool:
        return token in self.ids

    def allowed(self) -> NDArray[np.uint32]:
        self.masks += 1
        bits = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in self.ids:
            bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def forced(self) -> list[int]:
        return self.script[len(self.followed[-1]) :]


def test_greedy_choice_takes_the_largest_allowed_logit_and_masks_only_if_it_must() -> None:
    order = np.argsort(-LOGITS).tolist()
    asked = Fixed(order[:1])
    assert Sampler(constraint=asked).pick(LOGITS, [0], 0) == order[0] and asked.masks == 0
    masking = Fixed(order[3:])
    assert Sampler(constraint=masking).pick(LOGITS, [0], 0) == order[3] and masking.masks == 1


def test_the_constraint_follows_the_completion_without_the_prompt() -> None:
    constraint = Fixed(range(VOCAB))
    sampler = Sampler(constraint=constraint)
    sampler.pick(LOGITS, [1, 2, 3], 0)
    sampler.pick(LOGITS, [1, 2, 3, 8, 9], 2)
    assert constraint.followed == [[], [8, 9]]


def test_draws_have_exactly_the_distribution_of_the_allowed_tokens() -> None:
    ids, draws = [1, 5, 33, 39], 20_000
    sampler = Sampler(Sampling(temperature=1.0, seed=3), constraint=Fixed(ids))
    counts = np.bincount([sampler.pick(LOGITS, [0], draw) for draw in range(draws)], minlength=VOCAB)
    weights = np.exp(LOGITS[ids])
    assert counts.sum() == counts[ids].sum()
    np.testing.assert_allclose(counts[ids] / draws, weights / weights.sum(), atol=0.012)


def test_a_draw_that_is_repeated_gives_the_same_id() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=3), constraint=Fixed([4, 7, 30]))
    once = [sampler.pick(LOGITS, [0] * (draw + 1), draw) for draw in range(12)]
    for draw in (3, 3, 0, 11, 1):
        assert sampler.pick(LOGITS, [0] * (draw + 1), draw) == once[draw]


def test_what_is_recorded_does_not_change_what_is_picked() -> None:
    def picks(logprobs: WantedLogprobs | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=3), constraint=Fixed([4, 7, 30]), logprobs=logprobs)
        return [sampler.pick(LOGITS, [0] * (draw + 1), draw) for draw in range(12)]

    assert picks(None) == picks(WantedLogprobs(2)) == picks(WantedLogprobs(2, "processed"))


def test_a_forced_id_is_certain_in_what_it_was_picked_from() -> None:
    sampler = Sampler(constraint=Fixed([7], forced=[7]), logprobs=WantedLogprobs(2, "processed"))
    assert sampler.pick(LOGITS, [0], 0) == 7
    assert sampler.logprobs[0].top == ((7, 0.0), (0, -np.inf)) and sampler.logprobs[0].logprob == 0.0


def test_the_end_comes_where_nothing_else_may_whatever_the_smallest_length_is() -> None:
    sampler = Sampler(Sampling(min_new_tokens=9), frozenset({5}), Fixed([5]))
    assert sampler.pick(LOGITS, [0], 0) == 5


def test_forced_ids_are_taken_as_they_are() -> None:
    constraint = Fixed(range(VOCAB), forced=[7, 3])
    sampler = Sampler(Sampling(temperature=1.0, min_new_tokens=9), frozenset({3}), constraint)
    assert [sampler.pick(LOGITS, [0, *[7, 3][:draw]], draw) for draw in range(2)] == [7, 3]
    assert constraint.masks == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processed_logprobs_are_those_of_the_allowed_tokens(temperature: float) -> None:
    sampler = Sampler(
        Sampling(temperature=temperature, seed=1),
        constraint=Fixed([2, 3]),
        logprobs=WantedLogprobs(2, "processed"),
    )
    token = sampler.pick(LOGITS, [0], 0)
    found = dict(sampler.logprobs[0].top)
    weights = np.exp(LOGITS[[2, 3]].astype(np.float64))
    assert token in (2, 3)
    np.testing.assert_allclose([found[2], found[3]], np.log(weights / weights.sum()), atol=1e-5)

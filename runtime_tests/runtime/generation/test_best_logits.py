"""A pick from the largest logits is the pick from all of them, or the largest ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from tp_runtime.generation import Sampler, Sampling, WantedLogprobs
from tp_runtime.session.best_logits import BestLogits, best_logits

VOCAB, BEST = 400, 64
SETTINGS = [
    Sampling(),
    *(Sampling(temperature=t, top_k=k, seed=3) for t in (0.3, 1.0, 2.0) for k in (1, 5, 40, 63)),
    Sampling(temperature=1.0, top_k=20, top_p=0.7, seed=4),
    Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.05, seed=5),
]


def rows(kind: str) -> np.ndarray:
    """Return logits [rows, vocab] as float16 holds them: without ties, or with many, or few of them finite."""
    rng = np.random.default_rng(len(kind))
    logits = rng.standard_normal((40, VOCAB)) * 3
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    elif kind == "excluded":
        logits[:, rng.permutation(VOCAB)[:300]] = -np.inf
    return logits.astype(np.float16).astype(np.float32)


def of(logits: np.ndarray, number: int, seed: int = 0) -> BestLogits | None:
    """Return what a device would: the largest logits in some order, of which equal ones may be any."""
    shuffled = np.random.default_rng(seed).permutation(len(logits))
    found = shuffled[np.argsort(-logits[shuffled], kind="stable")[:BEST]]
    found = np.random.default_rng(seed + 1).permutation(found)
    return best_logits(logits[found].astype(np.float16), found, number, len(logits))


@pytest.mark.parametrize("kind", ["plain", "ties", "excluded"])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_a_pick_from_the_largest_logits_is_the_pick_from_all(sampling: Sampling, kind: str) -> None:
    whole, part = Sampler(sampling), Sampler(sampling)
    served = 0
    for draw, logits in enumerate(rows(kind)):
        best = of(logits, part.best, seed=draw)
        served += best is not None
        assert part.pick(logits if best is None else best, [], draw) == whole.pick(logits, [], draw)
    assert served > 0 or (kind == "ties" and sampling.top_k > 20)


@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_an_overflow_among_the_largest_logits_needs_all_of_them(special: float) -> None:
    logits = rows("plain")[0]
    logits[7] = special
    ids = np.array([7, *np.argsort(-np.nan_to_num(logits, nan=-np.inf))[: BEST - 1]])
    assert best_logits(logits[ids], ids, 1, VOCAB) is None


def test_logits_of_which_none_is_finite_need_all_of_them() -> None:
    assert of(np.full(VOCAB, -np.inf, np.float32), 1) is None


def test_more_equal_logits_than_the_device_returns_need_all_of_them() -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert of(logits, 1) is None
    logits[-(BEST - 1) :] = 1  # with one more, all equal ones are known
    best = of(logits, 1)
    assert best is not None and best.ids.tolist() == list(range(VOCAB - BEST + 1, VOCAB))


def test_more_logits_than_the_device_returns_need_all_of_them() -> None:
    assert of(rows("plain")[0], BEST + 1) is None


def test_a_device_that_returns_all_logits_serves_every_number_of_them() -> None:
    logits = rows("ties")[0]
    best = best_logits(logits, np.arange(VOCAB), VOCAB, VOCAB)
    assert best is not None and np.array_equal(best.values, logits)


def test_requests_that_depend_on_more_than_the_largest_logits_say_so() -> None:
    depends = [
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(repetition_penalty=1.1),
        Sampling(temperature=1.0, top_k=5, presence_penalty=0.5),
        Sampling(logit_bias={3: 1.0}),
        Sampling(min_new_tokens=2),
    ]
    assert [Sampler(sampling).best for sampling in depends] == [0] * len(depends)
    assert Sampler(logprobs=WantedLogprobs(0)).best == 0
    assert (Sampler().best, Sampler(Sampling(temperature=1.0, top_k=5)).best) == (1, 5)

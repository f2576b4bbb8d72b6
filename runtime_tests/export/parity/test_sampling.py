"""The edge half compared with transformers: the ids that sampling keeps, and their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from runtime_tests.runtime.generation.test_sampling import VOCAB, row
from tp_runtime.generation import Sampling
from tp_runtime.generation.scores import candidates


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": VOCAB + 5},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 0.9},
        {"top_k": 100, "top_p": 0.8, "min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    ],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_kept_ids_and_probabilities_equal_those_of_transformers(
    seed: int, temperature: float, settings: dict[str, Any]
) -> None:
    logits = row(seed)
    logits[::7] = -np.inf
    history = [5, 5, 7, int(logits.argmax())]
    scores, ids = torch.from_numpy(logits)[None].double(), torch.tensor([history])
    if "repetition_penalty" in settings:
        scores = hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(ids, scores)
    scores = hf.TemperatureLogitsWarper(temperature)(ids, scores)
    if "top_k" in settings:
        scores = hf.TopKLogitsWarper(settings["top_k"])(ids, scores)
    if "top_p" in settings:
        scores = hf.TopPLogitsWarper(settings["top_p"])(ids, scores)
    if "min_p" in settings:
        scores = hf.MinPLogitsWarper(settings["min_p"])(ids, scores)
    want = scores.softmax(-1)[0].numpy()

    sampling = Sampling(temperature=temperature, **settings)
    kept, probabilities = _after_penalty(logits, history, sampling)
    assert kept.tolist() == np.flatnonzero(want).tolist()
    np.testing.assert_allclose(probabilities, want[kept], rtol=1e-5)


def _after_penalty(logits: np.ndarray, history: list[int], sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    # The penalty is written out for one token at a time, independently of the code under test.
    scores = logits.astype(np.float64)
    for token in set(history):
        up, down = scores[token] / sampling.repetition_penalty, scores[token] * sampling.repetition_penalty
        scores[token] = down if scores[token] < 0 else up
    return candidates(scores, sampling)

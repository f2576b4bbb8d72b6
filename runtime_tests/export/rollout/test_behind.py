"""Completions behind cached entries: those of the whole prompts, however long the prompts and whatever ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import token_ids
from tp_export.decoder import TorchPrefix, cached_prompt
from tp_export.rollout import Ending, RolloutStore, complete
from tp_export.source import load_model, open_source

BEGINNING = token_ids(21, seed=50)
PROMPTS = [[*BEGINNING, *token_ids(1 + 3 * i, seed=i)] for i in (2, 0, 4, 1, 3)]
NO_END = Ending(frozenset({2}))
STEPS = 12


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gemma2", "gpt2", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(open_source(tiny_model(tmp_path_factory.mktemp("model") / "m", request.param)))


@pytest.fixture(scope="module")
def cached(model: Any) -> TorchPrefix:
    return cached_prompt(model, BEGINNING, BEGINNING)


@pytest.fixture(scope="module")
def whole(model: Any) -> list[tuple[int, ...]]:
    """What transformers' own generate answers to the whole prompts."""
    return complete(model, PROMPTS, STEPS, NO_END)


def letters(ids: Any) -> str:
    return "".join(chr(0x4E00 + token) for token in ids)


def test_greedy_completions_are_those_of_the_whole_prompts(
    model: Any, cached: TorchPrefix, whole: list[tuple[int, ...]]
) -> None:
    for size in (1, 2, 5):
        assert complete(model, PROMPTS, STEPS, NO_END, prefix=cached, batch_size=size) == whole
    assert len(set(whole)) > 1


def test_every_row_ends_by_itself(model: Any, cached: TorchPrefix, whole: list[tuple[int, ...]]) -> None:
    """At an end-of-sequence id, and at the token that completes a stop string; the other rows go on."""
    endings = (
        Ending(frozenset({whole[0][3], whole[2][7]})),
        Ending(frozenset({2}), (letters(whole[1][2:4]), letters(whole[3][5:6])), letters),
        Ending(frozenset({whole[2][1]}), (letters(whole[0][4:7]),), letters),
    )
    for ending in endings:
        found = complete(model, PROMPTS, STEPS, ending, prefix=cached)
        assert found == [ending.cut(answer) for answer in whole] == complete(model, PROMPTS, STEPS, ending)
        assert min(map(len, found)) < STEPS
        for answer in found:
            assert ending.reached(answer) or len(answer) == STEPS
            assert not any(ending.reached(answer[:end]) for end in range(1, len(answer)))


def test_samples_depend_only_on_the_seed(model: Any, cached: TorchPrefix) -> None:
    state = torch.get_rng_state()
    one, again, other = (
        complete(model, PROMPTS, STEPS, NO_END, prefix=cached, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)
    cold = complete(model, PROMPTS, STEPS, NO_END, prefix=cached, temperature=1e-4)
    assert cold == complete(model, PROMPTS, STEPS, NO_END)


def test_answers_behind_the_cache_are_stored_as_those_of_the_prompts(
    model: Any, cached: TorchPrefix, whole: list[tuple[int, ...]], tmp_path: Path
) -> None:
    file = tmp_path / "r.jsonl"
    done: list[int] = []
    store = RolloutStore(file, "base")
    assert complete(model, PROMPTS[:3], STEPS, NO_END, prefix=cached, store=store, batch_size=1) == whole[:3]
    options: dict[str, Any] = {"batch_size": 1, "store": RolloutStore(file, "base"), "progress": done.append}
    assert complete(model, PROMPTS, STEPS, NO_END, prefix=cached, **options) == whole
    assert done[0] == 3 and sum(done) == len(PROMPTS) and len(RolloutStore(file, "base")) == len(PROMPTS)
    # With a stop string another answer is asked for.
    ending = Ending(frozenset({2}), (letters(whole[0][2:3]),), letters)
    assert complete(model, PROMPTS[:1], STEPS, ending, store=store) == [ending.cut(whole[0])]

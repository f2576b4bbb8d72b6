"""Rollouts: the answers do not depend on the batch, are stored in a file, and continue after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.logits import token_ids
from tp_export.rollout import Ending, RolloutStore, complete
from tp_export.source import load_model, open_source
from tp_runtime.errors import CalibrationError

PROMPTS = [token_ids(4 + i, seed=i) for i in range(7)]
EOS = Ending(frozenset({2}))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(open_source(tiny_llama))


def test_greedy_answers_do_not_depend_on_the_batch(model: Any) -> None:
    single = complete(model, PROMPTS, 5, EOS, batch_size=1)
    assert complete(model, PROMPTS, 5, EOS, batch_size=3) == single
    assert all(1 <= len(answer) <= 5 for answer in single)


def test_samples_depend_only_on_the_seed(model: Any) -> None:
    state = torch.get_rng_state()
    one, again, other = (complete(model, PROMPTS, 5, EOS, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_generation_config_of_the_model_is_ignored(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation config may set a repetition penalty, but the method compares distributions, not samplers."""
    plain = complete(model, PROMPTS, 8, EOS)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(model.generation_config, "max_length", 3)
    assert complete(model, PROMPTS, 8, EOS) == plain


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_rollout_can_be_continued(
    temperature: float, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.jsonl"
    whole = complete(model, PROMPTS, 5, EOS, temperature=temperature, batch_size=2)

    def stop(_done: int) -> None:
        if len(RolloutStore(file, "base")) >= 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        complete(
            model,
            PROMPTS,
            5,
            EOS,
            temperature=temperature,
            batch_size=2,
            store=RolloutStore(file, "base"),
            progress=stop,
        )
    with file.open("a") as handle:
        handle.write('{"asked": "half a li')
    prompts_run = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **options: prompts_run.append(len(ids)) or generate(ids, **options)
    )
    done: list[int] = []
    options: dict[str, Any] = {"temperature": temperature, "batch_size": 2, "progress": done.append}
    assert complete(model, PROMPTS, 5, EOS, store=RolloutStore(file, "base"), **options) == whole
    assert sum(prompts_run) == len(PROMPTS) - 4 and sum(done) == len(PROMPTS)
    assert len(file.read_text().splitlines()) == len(PROMPTS)
    # With other settings or another base, the stored answers do not apply.
    complete(model, PROMPTS, 6, EOS, store=RolloutStore(file, "base"))
    complete(model, PROMPTS, 5, EOS, store=RolloutStore(file, "another"))
    assert len(RolloutStore(file, "base")) == 3 * len(PROMPTS)


@pytest.mark.parametrize("line", ["no json", json.dumps({"asked": "x"}), json.dumps([1]), "{}"])
def test_another_kind_of_file_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(CalibrationError, match=r"r\.jsonl, line 1.*--rollouts"):
        RolloutStore(file, "base")
    if line.startswith('{"asked"'):
        return
    file.write_text(line)  # without its line end, the text is still not the start of a line of a store
    with pytest.raises(CalibrationError, match=r"r\.jsonl, line 1.*--rollouts"):
        RolloutStore(file, "base")
    assert file.read_text() == line

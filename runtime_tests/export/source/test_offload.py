"""Layers on disk: the same logits, rollouts and fits as in memory, with one layer loaded at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.entries import all_entries
from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, token_ids
from tp_export.fit import Settings, fit_lockstep
from tp_export.fit.entries import Compaction
from tp_export.fit.lockstep import Behind
from tp_export.rollout import Dialogue, Ending, complete
from tp_export.source import load_model, open_source, resident
from tp_runtime.errors import DeviceUnavailableError, ModelFormatError

IDS = token_ids(20)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2", "gpt_neox", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture
def both(folder: Path) -> tuple[Any, Any]:
    source = open_source(folder)
    return load_model(source), load_model(source, offload=True)


def loaded(model: Any) -> set[str]:
    """Return the names of the layers whose weights are in memory."""
    in_memory = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    return {match[0] for name in in_memory if (match := re.match(r"\w+\.\w+\.\d+(?=\.)", name))}


def counts_of_loaded(model: Any) -> list[tuple[int, int]]:
    """Return a list that grows when a layer runs: the layer, and how many layers are then in memory."""
    counts: list[tuple[int, int]] = []
    blocks = [module for module in model.modules() if hasattr(module, "_tp_weights")]
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: counts.append((index, len(loaded(model)))))
    return counts


def test_logits_and_completions_equal_those_in_memory(both: tuple[Any, Any]) -> None:
    memory, disk = both
    assert loaded(disk) == set() and len(loaded(memory)) == 3
    assert furthest(torch_logits(disk, IDS), torch_logits(memory, IDS)) == 0
    assert complete(disk, [IDS], 5, Ending(frozenset({2}))) == complete(memory, [IDS], 5, Ending(frozenset({2})))
    assert loaded(disk) == set()


def test_a_fit_equals_that_in_memory_and_loads_one_layer_at_a_time(both: tuple[Any, Any]) -> None:
    memory, disk = both
    dialogues = [Dialogue((1, *token_ids(9, seed=s)), (1, 5), tuple(token_ids(8, seed=s + 1))) for s in range(4)]
    counts = counts_of_loaded(disk)
    found = [fit_lockstep(model, dialogues, "output", Settings(rank=3))[0] for model in (memory, disk)]
    for layer, sites in found[0].items():
        for name in ("a", "b", "bias"):
            assert torch.equal(getattr(sites["mlp_out"], name), getattr(found[1][layer]["mlp_out"], name))
    assert set(counts) == {(0, 1), (1, 1), (2, 1)} and loaded(disk) == set()


def test_entries_equal_those_in_memory(both: tuple[Any, Any]) -> None:
    """The fit of a layer's entries stops that layer halfway, and its weights are freed all the same."""
    context = token_ids(20, seed=50)
    queries = [token_ids(3 + s, seed=s) for s in range(4)]
    dialogues = [Dialogue((1, *context, *q), (1, 5, *q), tuple(token_ids(8, seed=60 + q[0]))) for q in queries]
    counts: list[tuple[int, int]] = []
    found = []
    for model in both:
        whole = all_entries(model, dialogues)
        teacher = replace(whole, replaces=dialogues[0].teacher_prompt[: whole.position])
        if model is both[1]:
            counts = counts_of_loaded(model)
        behind = Behind(teacher, whole, Compaction((5, 4, 5)))
        _deltas, prefix = fit_lockstep(model, dialogues, None, Settings(), behind=behind)
        assert prefix is not None and prefix.counts == (5, 4, 5)
        found.append(prefix)
    for in_memory, from_disk in zip(*(prefix.entries for prefix in found), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(in_memory, from_disk, strict=True))
    assert set(counts) == {(0, 1), (1, 1), (2, 1)} and loaded(both[1]) == set()


def test_a_layer_that_fails_is_freed(both: tuple[Any, Any]) -> None:
    _, disk = both
    block = next(m for n, m in disk.named_modules() if n.endswith(".1") and hasattr(m, "_tp_weights"))
    with pytest.raises(RuntimeError, match="on purpose"), resident(block):
        assert len(loaded(disk)) == 1
        raise RuntimeError("on purpose")
    assert loaded(disk) == set()


def test_weights_under_other_names_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, copy / "model.safetensors")
    with pytest.raises(ModelFormatError, match="weights of the model are missing from its files"):
        load_model(open_source(copy), offload=True)


def test_a_device_map_and_offload_are_refused_together(folder: Path) -> None:
    with pytest.raises(DeviceUnavailableError, match="--offload"):
        load_model(open_source(folder), "map", offload=True)

"""LoRA adapters whose config and tensors differ in their modules: what PEFT applies is imported, the rest is said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from runtime_tests.export.formats.test_peft import trained
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import random_config
from tp_export import cli
from tp_export.decoder import site_linears
from tp_export.formats import read_peft
from tp_export.source import load_model, open_source
from tp_runtime.errors import PatchFormatError, PatchTargetError, PatchVersionError
from tp_runtime.patch import Patch

IDS = token_ids(20)
Q, V, DOWN = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    return load_model(open_source(tiny_llama))


@pytest.fixture(scope="module")
def unpatched(model: nn.Module) -> np.ndarray:
    return torch_logits(model, IDS)


@pytest.fixture(scope="module")
def wide(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random tensors for q, v and down of all three layers."""
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2, "lora_alpha": 3}
    return trained(tiny_llama, tmp_path_factory.mktemp("wide"), **settings)


def narrowed(wide: Path, out: Path, keep: Callable[[str], bool] = lambda name: True, **changes: Any) -> Path:
    """Copy an adapter with other settings, and with only the tensors whose names `keep` accepts."""
    out.mkdir()
    config = json.loads((wide / "adapter_config.json").read_text()) | changes
    (out / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(wide / "adapter_model.safetensors")
    save_file({name: values for name, values in tensors.items() if keep(name)}, out / "adapter_model.safetensors")
    return out


def logits_of_peft(tiny_llama: Path, adapter: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what it leaves out or misses, which is the subject here
        wrapped = PeftModel.from_pretrained(load_model(open_source(tiny_llama)), str(adapter)).eval()
    with torch.no_grad():
        return wrapped(torch.tensor([IDS]), use_cache=False).logits[0].numpy()


NARROW: dict[str, tuple[dict[str, Any], list[tuple[int, str]]]] = {
    "one layer": ({"layers_to_transform": 1}, [(1, "down"), (1, "q"), (1, "v")]),
    "layers": ({"layers_to_transform": [0, 2, 7]}, [(i, site) for i in (0, 2) for site in ("down", "q", "v")]),
    "no layers": ({"layers_to_transform": []}, [(i, site) for i in range(3) for site in ("down", "q", "v")]),
    "layers of a name": (
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        [(1, "down"), (1, "q"), (1, "v")],
    ),
    "layers of names": (
        {"layers_to_transform": [2], "layers_pattern": ["blocks", "lay.rs"]},
        [(2, "down"), (2, "q"), (2, "v")],
    ),
    "a full name beside layers": (
        {"layers_to_transform": [2], "target_modules": [f"model.layers.0.{Q}", "v_proj"]},
        [(0, "q"), (2, "v")],
    ),
    "excluded ends": ({"exclude_modules": ["q_proj", f"layers.1.{DOWN}"]}, [(0, "down"), (0, "v"), (1, "v")]),
    "excluded names": ({"exclude_modules": [f"model.layers.0.{V}"], "layers_to_transform": 0}, [(0, "down"), (0, "q")]),
    "an excluded pattern": ({"exclude_modules": r".*\.(0|2)\..*|.*v_proj"}, [(1, "down"), (1, "q")]),
    "an excluded part of a name": ({"exclude_modules": "q_proj", "layers_to_transform": 0}, [(0, "down"), (0, "q")]),
    "a target pattern": ({"target_modules": r".*\.[01]\.mlp\.down_proj"}, [(0, "down"), (1, "down")]),
    "a pattern without case": ({"target_modules": "(?i).*DOWN_PROJ"}, [(0, "down"), (1, "down"), (2, "down")]),
    "all linear but some": ({"target_modules": "All-Linear", "exclude_modules": r".*\.[12]\..*"}, [(0, "down")]),
    "fewer targets": ({"target_modules": ["v_proj"]}, [(0, "v"), (1, "v"), (2, "v")]),
    "an alpha pattern": (
        {"target_modules": ["v_proj"], "alpha_pattern": {"layers.0.*": 9, "v_proj": 1, r"x|(.*)": 5}},
        [(0, "v"), (2, "v")],
    ),
    "rsLoRA": ({"use_rslora": True, "exclude_modules": ["v_proj"]}, [(0, "down"), (0, "q")]),
}


@pytest.mark.parametrize("case", NARROW)
def test_only_what_peft_applies_is_imported(
    case: str, model: nn.Module, unpatched: np.ndarray, wide: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    settings, expected = NARROW[case]
    folder = narrowed(wide, tmp_path / "a", **settings)
    adapter = read_peft(folder, site_linears(model))
    assert set(expected) <= adapter.deltas.keys()
    wanted = logits_of_peft(tiny_llama, folder)
    assert furthest(wanted, unpatched) > 1e-2
    assert furthest(torch_logits(model, IDS, Patch(adapter.deltas, random_config())), wanted) < 1e-5
    left_out = 9 - len(adapter.deltas)
    assert any("leaves out, as PEFT does" in note for note in adapter.notes) == (left_out > 0)


def test_a_layer_without_tensors_is_said_and_adds_nothing_as_with_peft(
    model: nn.Module, wide: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = narrowed(wide, tmp_path / "a", keep=lambda name: "layers.1." not in name)
    adapter = read_peft(folder, site_linears(model))
    assert {layer for layer, _ in adapter.deltas} == {0, 2}
    wanted = logits_of_peft(tiny_llama, folder)
    assert furthest(torch_logits(model, IDS, Patch(adapter.deltas, random_config())), wanted) < 1e-5
    out = tmp_path / "p.safetensors"
    assert cli.main(["import", str(folder), str(out), "--base", str(tiny_llama)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n" and Patch.load(out).deltas.keys() == adapter.deltas.keys()
    assert f"note: the adapter has no tensors for model.layers.1.{Q}, model.layers.1.{V}" in captured.err


@pytest.mark.parametrize("init", [False, None])
def test_a_layer_that_peft_would_draw_at_random_is_refused(
    init: bool | None, model: nn.Module, wide: Path, tmp_path: Path
) -> None:
    folder = narrowed(wide, tmp_path / "a", keep=lambda name: "layers.1." not in name, init_lora_weights=init)
    with pytest.raises(PatchTargetError, match=r"at random.*layers\.1"):
        read_peft(folder, site_linears(model))
    whole = narrowed(wide, tmp_path / "b", init_lora_weights=init)
    assert len(read_peft(whole, site_linears(model)).deltas) == 9


def test_biases_count_only_if_the_config_has_them(
    model: nn.Module, wide: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = narrowed(wide, tmp_path / "a", keep=lambda name: DOWN in name, target_modules=["down_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.{DOWN}.lora_B.bias"
    save_file({**tensors, name: torch.full((64,), 0.5)}, folder / "adapter_model.safetensors")
    for bias, said in ((False, "leaves out"), (True, "has no tensors for")):
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_bias": bias}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        adapter = read_peft(folder, site_linears(model))
        assert (adapter.deltas[0, "down"].bias is not None) == bias
        assert any(said in note and "lora_B.bias" in note for note in adapter.notes)
        patched = torch_logits(model, IDS, Patch(adapter.deltas, random_config()))
        assert furthest(patched, logits_of_peft(tiny_llama, folder)) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["k_proj"]},
        {"target_modules": []},
        {"exclude_modules": ".*"},
        {"layers_to_transform": [5]},
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
    ],
)
def test_an_adapter_that_peft_would_apply_nowhere_is_refused(
    settings: dict[str, Any], model: nn.Module, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(PatchTargetError, match="selects none of the adapter's tensors"):
        read_peft(narrowed(wide, tmp_path / "a", **settings), site_linears(model))


# -- values that are not valid -------------------------------------------------------------------------------

HUGE = 10**400
BAD: list[tuple[str, Any]] = [
    *[("r", value) for value in (0, -1, 2.0, "2", None, True, [2], HUGE, float("nan"))],
    *[("lora_alpha", value) for value in ("3", None, False, [3], {}, HUGE, 1e39, float("nan"), float("inf"))],
    *[("use_rslora", value) for value in ("yes", 1, None)],
    *[("lora_bias", value) for value in ("yes", 1, [])],
    *[("target_modules", value) for value in (None, 5, {"a": 1}, [1], ["q_proj", None], "(", "*", "a{9999999999}")],
    *[("exclude_modules", value) for value in (5, [1], {"a": 1}, "(", "(?P<a")],
    *[("layers_to_transform", value) for value in ("1", 1.0, True, [1.0], ["1"], [True], {"a": 1}, {})],
    *[("layers_pattern", value) for value in ("layers", ["layers"])],
    *[("rank_pattern", value) for value in ([2], "x", {"q_proj": 0}, {"q_proj": "2"}, {"q_proj": None}, {"(": 2})],
    *[("alpha_pattern", value) for value in ([2], {"q_proj": "2"}, {"q_proj": HUGE}, {"[": 2}, {"(" * 9999: 2})],
    ("base_model_name_or_path", 5),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{key}-{number}" for number, (key, _) in enumerate(BAD)])
def test_a_bad_number_type_or_pattern_names_its_key(
    key: str, value: Any, model: nn.Module, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(PatchFormatError, match=key):
        read_peft(narrowed(wide, tmp_path / "a", **{key: value}), site_linears(model))


@pytest.mark.parametrize("key", ["layers_to_transform", "layers_pattern"])
def test_settings_that_contradict_each_other_are_refused(
    key: str, model: nn.Module, wide: Path, tmp_path: Path
) -> None:
    """PEFT refuses layers beside a regular expression; with many targets it shortens names, and layers count again."""
    for number, targets in enumerate([".*q_proj", [f"model.layers.0.{Q}"] * 20]):
        changes = {"target_modules": targets, "layers_to_transform": [1], key: [1] if key[-1] == "m" else "layers"}
        with pytest.raises(PatchFormatError, match="layers_to_transform"):
            read_peft(narrowed(wide, tmp_path / f"a{number}", **changes), site_linears(model))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_takes_too_long_is_refused(
    key: str, model: nn.Module, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_export.formats.bounded_regex.LIMIT_S", 1.0)
    slow = r"([a-z0-9_.]+)+!"
    folder = narrowed(wide, tmp_path / "a", **{key: {slow: 2} if key == "rank_pattern" else slow})
    with pytest.raises(PatchFormatError, match=rf"{key}.*no match after 1 seconds"):
        read_peft(folder, site_linears(model))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "lora_ga", "mica", "corda", 1, [], "new"])
def test_initialisations_that_change_the_base_are_refused(
    init: Any, model: nn.Module, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(PatchVersionError, match="init_lora_weights"):
        read_peft(narrowed(wide, tmp_path / "a", init_lora_weights=init), site_linears(model))

"""Export and import of LoRA folders: peft gives the logits of the patch, and what cannot be converted is named."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, graph_logits, token_ids
from runtime_tests.patches import random_config
from tp_export import cli
from tp_export.decoder import slots_of
from tp_export.graph import export_model
from tp_export.source import load_model, open_source
from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchTargetError, PatchVersionError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import Graph, ModelFolder

TOLERANCE = 1e-4
IDS = token_ids(40)
FORMS = {"output": ("mlp_out",), "matrix": ("gate", "up", "mlp_out"), "lora": ("down",), "all": ("q", "v", "o", "down")}


@pytest.fixture(scope="module")
def export_all(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(open_source(tiny_llama), tmp_path_factory.mktemp("all") / "llama", slot_set="all")


def made_patch(source: Path, sites: tuple[str, ...], rank: Callable[[int], int], bias: bool = True) -> Patch:
    """Return random deltas of rank `rank(layer)` that are large enough to have an effect; rank 0 is only a bias."""
    opened = open_source(source)
    rng = np.random.default_rng(3)
    deltas = {}
    for slot in slots_of(load_model(opened), "all"):
        if slot.site not in sites:
            continue
        r = rank(slot.layer)
        b = 0.1 * rng.standard_normal(slot.outputs) if bias or not r else None
        if not r:
            deltas[slot.layer, slot.site] = Delta(bias=b)
        else:
            pair = rng.standard_normal((slot.inputs, r)), 0.02 * rng.standard_normal((r, slot.outputs))
            deltas[slot.layer, slot.site] = Delta(*pair, b)
    config = random_config(base_digest=opened.digest, base_model=opened.name, architecture=opened.architecture)
    return Patch(deltas, config)


def peft_logits(source: Path, adapter: Path, ids: list[int] = IDS) -> np.ndarray:
    """Return the logits of peft, and fails if the adapter lacks a tensor of its config."""
    model = load_model(open_source(source))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return wrapped(torch.tensor([ids]), use_cache=False).logits[0].numpy()


# -- export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [lambda layer: 4, lambda layer: (5, 0, 2)[layer]], ids=["one rank", "by layer"])
def test_peft_gives_the_logits_of_the_patch(
    form: str, rank: Callable[[int], int], tiny_llama: Path, tmp_path: Path
) -> None:
    patch = made_patch(tiny_llama, FORMS[form], rank)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    assert cli.main(["lora", str(tmp_path / "p.safetensors"), str(tmp_path / "lora"), "--base", str(tiny_llama)]) == 0
    model = load_model(open_source(tiny_llama))
    wanted = torch_logits(model, IDS, patch)
    assert furthest(wanted, torch_logits(model, IDS)) > 100 * TOLERANCE
    assert furthest(peft_logits(tiny_llama, tmp_path / "lora"), wanted) < TOLERANCE


def test_peft_gives_the_logits_of_a_patch_with_only_biases(tiny_llama: Path, tmp_path: Path) -> None:
    patch = made_patch(tiny_llama, ("mlp_out",), lambda layer: 0)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    cli.main(["lora", str(tmp_path / "p.safetensors"), str(tmp_path / "lora"), "--base", str(tiny_llama)])
    wanted = torch_logits(load_model(open_source(tiny_llama)), IDS, patch)
    assert furthest(peft_logits(tiny_llama, tmp_path / "lora"), wanted) < TOLERANCE


def test_an_adapter_without_biases_can_be_merged(tiny_llama: Path, tmp_path: Path) -> None:
    patch = made_patch(tiny_llama, ("mlp_out",), lambda layer: 2 + layer, bias=False)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    cli.main(["lora", str(tmp_path / "p.safetensors"), str(tmp_path / "lora"), "--base", str(tiny_llama)])
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # Engines that support neither patterns nor biases read these.
    assert (config["r"], config["lora_alpha"], config["lora_bias"]) == (4, 4, False)
    assert {
        t.shape[0] for name, t in load_file(tmp_path / "lora/adapter_model.safetensors").items() if "_A" in name
    } == {4}
    merged = PeftModel.from_pretrained(load_model(open_source(tiny_llama)), str(tmp_path / "lora")).merge_and_unload()
    wanted = torch_logits(load_model(open_source(tiny_llama)), IDS, patch)
    assert furthest(torch_logits(merged, IDS), wanted) < TOLERANCE


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Assert that the command exits with 2 and prints nothing on stdout; returns its stderr."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_patch_after_a_post_norm_cannot_become_a_lora(
    tiny_gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_patch(tiny_gemma, ("mlp_out",), lambda layer: 2).save(tmp_path / "p.safetensors")
    message = refused(["lora", tmp_path / "p.safetensors", tmp_path / "lora", "--base", tiny_gemma], capsys)
    assert "post-norm" in message and "--method lora" in message
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_another_base_is_refused(
    tiny_llama: Path, tiny_gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_patch(tiny_llama, ("down",), lambda layer: 2).save(tmp_path / "p.safetensors")
    message = refused(["lora", tmp_path / "p.safetensors", tmp_path / "lora", "--base", tiny_gemma], capsys)
    assert "another base" in message and not (tmp_path / "lora").exists()


def test_an_interruption_leaves_no_folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_patch(tiny_llama, ("down",), lambda layer: 2).save(tmp_path / "p.safetensors")

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tp_export.formats.peft_out.save_file", full)
    assert cli.main(["lora", str(tmp_path / "p.safetensors"), str(tmp_path / "lora"), "--base", str(tiny_llama)]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


# -- import --------------------------------------------------------------------------------------------------

TRAINED: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 4, "lora_alpha": 6},
    "every linear, rslora": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"down_proj": 6, r".*layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 3},
    },
    "biases": {"target_modules": r".*\.mlp\.down_proj", "r": 2, "lora_alpha": 3, "lora_bias": True},
}


def trained(source: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter with peft, with random tensors."""
    model = get_peft_model(load_model(open_source(source)), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * (0.3 if "lora_A" in name else 0.05))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", TRAINED)
@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_the_runtime_gives_the_logits_of_peft(form: str, tiny_llama: Path, export_all: Path, tmp_path: Path) -> None:
    adapter = trained(tiny_llama, tmp_path / "adapter", **TRAINED[form])
    out = tmp_path / "imported.safetensors"
    assert cli.main(["import", str(adapter), str(out), "--base", str(tiny_llama)]) == 0
    graph = Graph(ModelFolder.open(export_all), "cpu")
    patch = Patch.load(out)
    assert (patch.config.method, patch.name, patch.config.fidelity) == ("imported", "adapter", None)
    wanted = peft_logits(tiny_llama, adapter)
    assert furthest(wanted, graph_logits(graph, IDS)) > 100 * TOLERANCE
    assert furthest(graph_logits(graph, IDS, graph.bind(patch)), wanted) < TOLERANCE


def test_the_probe_of_an_imported_patch_passes(tiny_llama: Path, export_all: Path, tmp_path: Path) -> None:
    adapter = trained(tiny_llama, tmp_path / "adapter", **TRAINED["attention"])
    cli.main(["import", str(adapter), str(tmp_path / "p.safetensors"), "--base", str(tiny_llama), "--name", "mine"])
    model = PatchedModel.from_pretrained(export_all, device="cpu")
    assert model.load_patch(tmp_path / "p.safetensors", check=True) == "mine"


def test_an_exported_and_imported_patch_is_the_same_patch(tiny_llama: Path, tmp_path: Path) -> None:
    patch = made_patch(tiny_llama, ("q", "gate", "down"), lambda layer: 3)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    cli.main(["lora", str(tmp_path / "p.safetensors"), str(tmp_path / "lora"), "--base", str(tiny_llama)])
    cli.main(["import", str(tmp_path / "lora"), str(tmp_path / "q.safetensors"), "--base", str(tiny_llama)])
    assert Patch.load(tmp_path / "q.safetensors").identity == patch.identity


def altered(adapter: Path, **changes: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return adapter


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts"]),
        ("alora_invocation_tokens", [1, 2]),
        ("a_setting_of_tomorrow", "on"),
    ],
)
def test_settings_that_a_patch_cannot_represent_are_refused(
    key: str, value: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    from tp_export.decoder import model_without_weights, site_linears
    from tp_export.formats import read_peft

    adapter = altered(trained(tiny_llama, tmp_path / "adapter", **TRAINED["attention"]), **{key: value})
    with pytest.raises(PatchVersionError, match=key):
        read_peft(adapter, site_linears(model_without_weights(open_source(tiny_llama).config)))


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}),
            PatchTargetError,
            "lm_head",
        ),
        (lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(64)}), PatchTargetError, "magnitude"),
        (lambda t: t.pop(f"{FIRST}.lora_B.weight"), PatchTargetError, "half of a pair"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 32)}), PatchShapeError, "q_proj.lora_A"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(5, 64)}), PatchShapeError, "q_proj.lora_A"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 64).long()}), PatchFormatError, "dtype"),
        (lambda t: t.clear(), PatchTargetError, "no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Any, error: type[Exception], named: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from tp_export.decoder import model_without_weights, site_linears
    from tp_export.formats import read_peft

    adapter = trained(tiny_llama, tmp_path / "adapter", **TRAINED["attention"])
    change_tensors(adapter, change)
    with pytest.raises(error, match=named):
        read_peft(adapter, site_linears(model_without_weights(open_source(tiny_llama).config)))


def test_pickles_are_never_opened(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(tiny_llama, tmp_path / "adapter", **TRAINED["attention"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    out = tmp_path / "p.safetensors"
    assert "unsafe format" in refused(["import", adapter, out, "--base", tiny_llama], capsys)
    message = refused(["import", adapter / "adapter_model.bin", out, "--base", tiny_llama], capsys)
    assert "never opened" in message
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    raw = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(raw[:-8])
    assert "truncated" in refused(["import", adapter, out, "--base", tiny_llama], capsys)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused(["import", adapter, out, "--base", tiny_llama], capsys)
    assert not out.exists()

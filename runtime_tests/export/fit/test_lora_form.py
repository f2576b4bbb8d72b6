"""`--method lora`: it equals `output` without a post-norm, has its own fit before a post-norm, and is always a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from runtime_tests.export.rows import some_rows
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, graph_logits, token_ids
from tp_export import cli
from tp_export.decoder import applied, blocks_of
from tp_export.fit import Settings
from tp_export.fit.forms import FORMS
from tp_export.fit.lora_form import pre_norm_target
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

IDS = token_ids(30)


@torch.no_grad()
def test_without_a_post_norm_lora_equals_output(tiny_llama: Path) -> None:
    model = load_model(open_source(tiny_llama))
    block, rows = blocks_of(model)[1], some_rows(model, 40)
    lora, output = (FORMS[method](block, rows, Settings(rank=5)) for method in ("lora", "output"))
    with applied(block, lora):
        one = block.mlp_half(rows.student)
    with applied(block, output):
        other = block.mlp_half(rows.student)
    assert (one - other).abs().max() < 1e-4


@torch.no_grad()
def test_the_target_is_on_the_sphere_of_the_norm_and_nearer_to_the_teacher(tiny_gemma: Path) -> None:
    model = load_model(open_source(tiny_gemma))
    block, rows = blocks_of(model)[1], some_rows(model, 40)
    wanted, before = block.mlp_half(rows.teacher), block.mlp_half(rows.student)
    hidden = block.hidden(rows.student)
    u = block.mlps[0].down(hidden).double()
    target, metric = pre_norm_target(block, hidden, wanted - before)
    moved = u + target
    assert torch.allclose(moved.square().mean(-1), u.square().mean(-1))  # rms(u') = rms(u_S)
    assert block.post_norm is not None and (metric > 0).all()
    after = rows.student + block.post_norm(moved.float())
    assert (after - wanted).square().sum() < 0.5 * (before - wanted).square().sum()


@torch.no_grad()
def test_without_ridge_and_at_full_rank_the_target_is_reached(tiny_gemma: Path) -> None:
    model = load_model(open_source(tiny_gemma))
    block, rows = blocks_of(model)[2], some_rows(model, 20)
    hidden = block.hidden(rows.student)
    difference = block.mlp_half(rows.teacher) - block.mlp_half(rows.student)
    target, _ = pre_norm_target(block, hidden, difference)
    delta = FORMS["lora"](block, rows, Settings(rank=48, ridge=1e-9))["down"]
    assert (delta(hidden) - target).abs().max() < 1e-3 * target.abs().max()


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gemma"])
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source: Path = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("lora") / "p.safetensors"
    options = ["--limit=4", "--holdout=2", "--max-new-tokens=4", "--rank=3", "--first-layer=1", "--prompt=Be a pirate."]
    assert cli.main(["patch", str(source), str(out), "--method", "lora", *options]) == 0
    return source, out


def test_the_fit_is_measured_and_can_be_exported_to_peft(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    source, file = fitted
    patch = Patch.load(file)
    assert patch.config.method == "lora" and patch.config.fidelity is not None
    assert set(patch.deltas) == {(1, "down"), (2, "down")}  # --first-layer 1
    assert cli.main(["lora", str(file), str(tmp_path / "lora"), "--base", str(source)]) == 0
    model = load_model(open_source(source))
    wanted = torch_logits(model, IDS, patch)
    wrapped = PeftModel.from_pretrained(load_model(open_source(source)), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        got = wrapped(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    assert furthest(got, wanted) < 1e-4


def test_the_patch_fits_an_export_with_all_slots(tiny_gemma: Path, tiny_gemma_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    options = ["--limit=4", "--holdout=0", "--max-new-tokens=4", "--rank=3", "--prompt=Be a pirate."]
    assert cli.main(["patch", str(tiny_gemma), str(out), "--method", "lora", *options]) == 0
    patch, graph = Patch.load(out), Graph(ModelFolder.open(tiny_gemma_export), "cpu")
    wanted = torch_logits(load_model(open_source(tiny_gemma)), IDS, patch)
    assert furthest(graph_logits(graph, IDS, graph.bind(patch)), wanted) < 1e-4


def test_a_first_layer_that_does_not_exist_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["patch", str(tiny_llama), str(tmp_path / "p.safetensors"), "--prompt", "Hi.", "--first-layer", "3"]
    assert cli.main(arguments) == 2
    assert "first_layer" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_a_bias_the_patch_can_be_exported_to_every_format(tiny_gemma: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    options = ["--limit=4", "--holdout=2", "--max-new-tokens=4", "--rank=3", "--no-bias", "--prompt=Be a pirate."]
    assert cli.main(["patch", str(tiny_gemma), str(out), "--method", "lora", *options]) == 0
    assert {tuple(delta.parts()) for delta in Patch.load(out).deltas.values()} == {("a", "b", "mean")}
    assert cli.main(["lora", str(out), str(tmp_path / "peft"), "--base", str(tiny_gemma)]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_bias"] is False
    assert cli.main(["lora", str(out), str(tmp_path / "gguf"), "--base", str(tiny_gemma), "--gguf"]) == 0
    assert [file.name for file in (tmp_path / "gguf").iterdir()] == ["lora.gguf"]


@torch.no_grad()
def test_without_a_bias_the_pair_is_fitted_to_uncentred_rows(tiny_llama: Path) -> None:
    """With full rank, no ridge and fewer rows than inputs, the pair without a bias reproduces every row."""
    model = load_model(open_source(tiny_llama))
    block, rows = blocks_of(model)[1], some_rows(model, 20)
    wanted = block.mlp_half(rows.teacher)
    before = (block.mlp_half(rows.student) - wanted).abs().max()
    delta = FORMS["lora"](block, rows, Settings(rank=64, ridge=1e-9, bias=False))["down"]
    assert delta.bias is None
    with applied(block, {"down": delta}):
        assert (block.mlp_half(rows.student) - wanted).abs().max() < 1e-3 * before

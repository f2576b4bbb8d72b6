"""One block of every block design, on tiny random models: the halves of the block, the static forms, and the sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.fit.test_forms import dialogues
from runtime_tests.export.rows import fit_affine
from runtime_tests.export.tiny import VARIANTS, tiny_model
from runtime_tests.patches import random_config
from tp_export.decoder import (
    SLOT_SETS,
    Block,
    TorchDelta,
    adapter_for,
    applied,
    blocks_of,
    layer_inputs,
    patched,
    plain_inputs,
    slots_of,
    weight_of,
)
from tp_export.decoder.adapters import ADAPTERS
from tp_export.fit import Settings, assemble, lockstep
from tp_export.fit.forms import FORMS, Rows
from tp_export.source import load_model, open_source
from tp_runtime.errors import CalibrationError, ModelFormatError

MIXTURES = {"mixtral", "qwen3_moe", "qwen3_moe normalised"}


@pytest.fixture(scope="module", params=[*ADAPTERS, *VARIANTS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The name of a design, and a model of that design."""
    folder = tmp_path_factory.mktemp("design")
    return request.param, load_model(open_source(tiny_model(folder, request.param)))


@pytest.fixture(scope="module")
def methods(case: tuple[str, Any]) -> list[str]:
    """The forms that can be fitted to the design."""
    return [method for method in FORMS if method not in ("matrix", "lora") or case[0] not in MIXTURES]


def some_rows(block: Block, count: int) -> Rows:
    g = torch.Generator().manual_seed(1)
    width = weight_of(block.mlps[0].down).shape[0] * (2 if block.parallel else 1)
    student = torch.randn(count, width, generator=g)
    return Rows(student + 0.3 * torch.randn(count, width, generator=g), student, torch.randn(1, width, generator=g))


def outputs_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the output o [1, T, d] of every layer of the unmodified model."""
    outputs: list[torch.Tensor] = []
    handles = [
        block.layer.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks_of(model)
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@torch.no_grad()
def test_attention_half_and_mlp_half_compose_the_layer(case: tuple[str, Any]) -> None:
    """The attention half followed by the MLP half computes what the layer does, including masks and positions."""
    _design, model = case
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = layer_inputs(model, ids, plain_inputs(torch.ones_like(ids)))
    for block, wanted in zip(blocks_of(model), outputs_of(model, ids), strict=True):
        split = block.attention_half(hidden, kwargs[block.index])
        assert split.shape[-1] == (2 if block.parallel else 1) * hidden.shape[-1]
        if block.parallel:
            assert torch.equal(block.normed(split), block.mlp_norm(hidden))
        hidden = block.mlp_half(split)
        assert (hidden - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_inputs_of_the_layers_are_found_without_the_head(case: tuple[str, Any]) -> None:
    """The head of a small model with many tokens is most of the work."""
    _design, model = case
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the head runs"))
    try:
        hidden, kwargs = layer_inputs(model, ids, plain_inputs(torch.ones_like(ids)))
    finally:
        handle.remove()
    assert hidden.shape == (1, 30, model.config.hidden_size) and len(kwargs) == len(blocks_of(model))


@torch.no_grad()
def test_without_ridge_and_at_full_rank_the_student_becomes_the_teacher(
    case: tuple[str, Any], methods: list[str]
) -> None:
    """With fewer rows than inputs the regression can interpolate. A vector can only reproduce the mean."""
    block = blocks_of(case[1])[0]
    rows = some_rows(block, 20)
    wanted = block.mlp_half(rows.teacher)
    difference = block.mlp_half(rows.student) - wanted
    before = difference.abs().max()
    for method in methods:
        with applied(block, FORMS[method](block, rows, Settings(rank=80, ridge=1e-9))):
            after = block.mlp_half(rows.student) - wanted
        if method == "lora" and block.post_norm is not None:  # a pair before the norm cannot be exact
            assert after.square().mean() < 0.1 * difference.square().mean()
            continue
        assert (after.mean(0) if method == "vector" else after).abs().max() < 2e-3 * before, method


@torch.no_grad()
def test_the_lockstep_fit_agrees_with_the_patched_model(case: tuple[str, Any], methods: list[str]) -> None:
    """The lock-step fit and the hooks on the whole model give the same last output, and the patch has an effect."""
    _design, model = case
    data = dialogues()
    ids = torch.tensor([data[0].student()])
    for method in methods:
        deltas, _ = lockstep.fit_lockstep(model, data, method, Settings(rank=3))
        hidden, kwargs = layer_inputs(model, ids, plain_inputs(torch.ones_like(ids)))
        for block in blocks_of(model):
            with applied(block, deltas[block.index]):
                hidden = block.mlp_half(block.attention_half(hidden, kwargs[block.index]))
        with patched(model, assemble(deltas, None, random_config(), "f16")):
            wanted = outputs_of(model, ids)[-1]
        assert (wanted - outputs_of(model, ids)[-1]).abs().max() > 0.02 * wanted.abs().max(), method
        assert (hidden - wanted).abs().max() < 5e-3 * wanted.abs().max(), method


@torch.no_grad()
def test_matrix_uses_one_map_for_every_linear_layer_that_reads_z(case: tuple[str, Any], methods: list[str]) -> None:
    """dW = W M with the ridge map M of z, for gate and up, Phi-3's joint matrix, and the first layer of a plain MLP."""
    if "matrix" not in methods:
        block = blocks_of(case[1])[0]
        for method in ("matrix", "lora"):
            with pytest.raises(CalibrationError, match="mixture of experts"):
                FORMS[method](block, some_rows(block, 8), Settings())
        return
    block = blocks_of(case[1])[0]
    rows = some_rows(block, 60)
    z_teacher, z_student = block.normed(rows.teacher), block.normed(rows.student)
    m = fit_affine(z_student, z_teacher - z_student, 0.7, block.normed(rows.sink)[0]).matrix
    deltas = FORMS["matrix"](block, rows, Settings(rank=64, ridge=0.7))
    assert set(deltas) == {*block.adapter.reads_z, "mlp_out"}
    for site, linear in block.mlps[0].reads_z.items():
        delta = deltas[site]
        assert delta.a is not None and delta.b is not None
        assert torch.allclose((delta.a @ delta.b).double(), (weight_of(linear).double() @ m).T, atol=5e-4)


@torch.no_grad()
def test_mlp_out_of_a_mixture_reads_the_input_of_the_experts(tmp_path: Path) -> None:
    """h differs between experts, so the site reads z and adds to the output of the mixture."""
    model = load_model(open_source(tiny_model(tmp_path, "mixtral")))
    block = blocks_of(model)[0]
    split = some_rows(block, 7).student
    assert torch.equal(block.hidden(split), block.normed(split))
    g = torch.Generator().manual_seed(2)
    delta = TorchDelta(torch.zeros(48), torch.randn(48, 2, generator=g), torch.randn(2, 48, generator=g))
    wanted = block.mlp_half(split) + delta(block.normed(split))
    with applied(block, {"mlp_out": delta}):
        assert torch.allclose(block.mlp_half(split), wanted, atol=1e-5)


def test_slots_match_the_linear_layers_of_the_architecture(case: tuple[str, Any]) -> None:
    design, model = case
    sites = {name: {slot.site for slot in slots_of(model, name) if slot.layer == 0} for name in SLOT_SETS}
    attention = {"phi3": {"qkv", "o"}, "gpt2": {"qkv", "o"}, "gpt_neox": {"qkv", "o"}}
    reads_z = {"phi3": {"gate_up"}, "gpt2": {"up"}, "gpt_neox": {"up"}}
    family = design.partition(" ")[0]
    mlp = set() if design in MIXTURES else reads_z.get(family, {"gate", "up"})
    down = set() if design in MIXTURES else {"down"}
    assert sites["output"] == {"mlp_out"}
    assert sites["mlp"] == {"mlp_out"} | mlp
    assert sites["all"] == {"mlp_out"} | mlp | down | attention.get(family, {"q", "k", "v", "o"})


def test_layers_without_experts_have_the_sites_of_plain_layers(tmp_path: Path) -> None:
    """A Qwen mixture may have plain layers between mixture layers, with the sites and sizes of plain layers."""
    model = load_model(open_source(tiny_model(tmp_path, "qwen3_moe")))
    slots = {(slot.layer, slot.site): (slot.inputs, slot.outputs) for slot in slots_of(model, "all")}
    assert slots[1, "mlp_out"] == (80, 48) and slots[1, "down"] == (80, 48)
    assert slots[0, "mlp_out"] == (48, 48) and (0, "down") not in slots


def test_the_error_of_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelFormatError) as error:
        adapter_for("mamba")
    assert error.value.got == "mamba" and set(str(error.value.wanted).split(" | ")) == set(ADAPTERS)

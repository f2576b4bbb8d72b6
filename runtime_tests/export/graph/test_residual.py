"""Graphs in float16 of models whose residual stream is larger than float16 can hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import graph_logits, token_ids
from runtime_tests.patches import patch_for
from tp_export.decoder import blocks_of
from tp_export.formats import write_onnx_adapter
from tp_export.graph import export as model_export
from tp_export.graph import export_model
from tp_export.graph.residual import residual_scale
from tp_export.graph_check import check_description, check_graph
from tp_export.quantise import QuantisedStudent, quantised
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import ModelFormatError
from tp_runtime.generation import Batch, Sampler, Sampling, generate
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder, check_probe, measure_probe

IDS = token_ids(40)
FACTOR = 2.0**16
PRECISIONS = ("fp16", "int4-rtn-fp16")


def blown_up(folder: Path, design: str) -> Source:
    """Write a tiny model that adds values FACTOR times as large to its residual stream, and little else differs."""
    tiny_model(folder, design, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in blocks_of(model):
            if block.adapter.attention_norm is None:
                for name in ("o", "down"):
                    block.layer.get_submodule(block.linears[name]).weight.mul_(FACTOR)
            else:
                for name in (block.adapter.attention_norm, block.adapter.post_norm):
                    weight = block.layer.get_submodule(str(name)).weight  # a norm multiplies by 1 + weight
                    weight.copy_((1 + weight) * FACTOR - 1)
    model.save_pretrained(folder)
    return open_source(folder)


def divergence(wanted: Any, got: Any) -> float:
    p, q = (torch.as_tensor(logits).log_softmax(-1) for logits in (wanted, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def large_patch(folder: ModelFolder, seed: int = 0) -> Patch:
    """Return a patch for every slot; what it adds to the residual stream is large, too."""
    patch = patch_for(folder, seed, scale=0.3)
    scaled = {key for key, slot in folder.slots.items() if slot.scale < 1}
    return Patch(
        {key: delta.scaled(FACTOR / 16) if key in scaled else delta for key, delta in patch.deltas.items()},
        patch.config,
    )


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model whose residual stream overflows float16, without and with post-norms."""
    return blown_up(tmp_path_factory.mktemp("blown-up"), request.param)


@pytest.fixture(scope="module")
def model(source: Source) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def folders(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """The exported folders with every slot, by precision."""
    root = tmp_path_factory.mktemp("exports")
    wanted = PRECISIONS if source.architecture == "gemma3_text" else ("fp16",)
    return {p: ModelFolder.open(export_model(source, root / p, precision=p, slot_set="all")) for p in wanted}


def folder_in(folders: dict[str, ModelFolder], precision: str) -> ModelFolder:
    if precision not in folders:
        pytest.skip("quantised weights that write to the stream are not scaled")
    return folders[precision]


def test_without_a_scale_the_export_is_refused(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_export, "residual_scale", lambda *_arguments: 1.0)
    with pytest.raises(ModelFormatError, match=r"does not compute what the model computes|does not fit float16"):
        export_model(source, tmp_path / "out", precision="fp16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_computes_the_model_with_and_without_a_patch_in_every_slot(
    model: Any, folders: dict[str, ModelFolder], precision: str
) -> None:
    folder, exact = folder_in(folders, precision), torch_logits(model, IDS)
    graph, patch = Graph(folder, "cpu"), large_patch(folder)
    if precision == "fp16":
        wanted, patched = exact, torch_logits(model, IDS, patch)
    else:
        with QuantisedStudent.of(model, quantised(precision)).whole():
            wanted, patched = torch_logits(model, IDS), torch_logits(model, IDS, patch)
    assert divergence(wanted, graph_logits(graph, IDS)) < 1e-3
    assert divergence(patched, wanted) > 0.01
    assert divergence(patched, graph_logits(graph, IDS, graph.bind(patch))) < 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_checks_of_an_export_pass(folders: dict[str, ModelFolder], precision: str) -> None:
    assert check_graph(folder_in(folders, precision).path)
    assert check_description(folders[precision].path)


def test_only_slots_that_add_to_the_residual_stream_have_the_scale(folders: dict[str, ModelFolder]) -> None:
    """Behind the layers `o` and `down` of a model with post-norms comes a norm."""
    folder = folders["fp16"]
    scaled = {site for (_layer, site), slot in folder.slots.items() if slot.scale < 1}
    assert scaled == ({"mlp_out"} if folder.architecture.startswith("gemma") else {"o", "down", "mlp_out"})
    assert len({slot.scale for slot in folder.slots.values()}) == 2


def test_keys_and_values_are_those_of_the_model(
    source: Source, folders: dict[str, ModelFolder], tmp_path: Path
) -> None:
    exact = Graph(ModelFolder.open(export_model(source, tmp_path / "fp32", slot_set="all")), "cpu")
    contents = []
    for graph in (exact, Graph(folders["fp16"], "cpu")):
        bound = graph.bind(large_patch(folders["fp16"]))
        cache = graph.new_cache(bound)
        graph.forward(IDS, cache, bound)
        contents.append({name: array.astype("f4") for name, array in graph.content(cache).items()})
    for name, wanted in contents[0].items():
        assert abs(contents[1][name] - wanted).max() < 0.02 * abs(wanted).max()


def test_rows_of_a_batch_under_different_patches_generate_what_they_generate_alone(
    folders: dict[str, ModelFolder],
) -> None:
    graph = Graph(folders["fp16"], "cpu")
    bounds = [graph.bind(large_patch(graph.folder, seed)) for seed in (1, 2)] + [graph.base]
    batch = Batch(graph, len(bounds))
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_ids": frozenset()}
    rows = [batch.join(IDS[:12], bound, sampler=Sampler(Sampling()), **options) for bound in bounds]
    while batch.rows or batch.joining:
        batch.step()
    alone = [list(generate(graph, IDS[:12], bound, sampler=Sampler(Sampling()), **options)) for bound in bounds]
    assert [row.tokens[12:] for row in rows] == alone
    assert len({tuple(row.tokens) for row in rows}) == 3


def test_a_probe_of_the_host_passes(model: Any, folders: dict[str, ModelFolder]) -> None:
    patch = large_patch(folders["fp16"])
    probe = measure_probe(IDS, torch_logits(model, IDS, patch))
    found = check_probe(Graph(folders["fp16"], "cpu"), Patch(patch.deltas, replace(patch.config, probe=probe)))
    assert found.ok and found.max_logit_error_unpatched > 4 * found.max_logit_error


def test_a_default_patch_and_an_adapter_hold_scaled_values(
    source: Source, folders: dict[str, ModelFolder], tmp_path: Path
) -> None:
    """Other programs run the graph's own values, or those of an adapter."""
    patch = large_patch(folders["fp16"])
    path = export_model(source, tmp_path / "out", precision="fp16", slot_set="all", patch=patch)
    graph, bound = Graph(ModelFolder.open(path), "cpu"), Graph(folders["fp16"], "cpu")
    wanted = graph_logits(bound, IDS, bound.bind(patch))
    assert (graph_logits(graph, IDS, graph.default) == wanted).all()
    assert check_graph(path)
    write_onnx_adapter(patch, folders["fp16"], tmp_path / "p.onnx_adapter")
    adapter = bound.ort.AdapterFormat.read_adapter(str(tmp_path / "p.onnx_adapter")).get_parameters()
    for name, value in bound.bind(patch).values.items():
        assert (adapter[name].numpy() == value.numpy()).all()


@pytest.mark.parametrize("design", ["gemma2", "gpt2", "gpt_neox", "phi3"])
def test_a_scale_changes_nothing_in_other_designs(design: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_export, "residual_scale", lambda *_arguments: 2.0**-5)
    source = open_source(tiny_model(tmp_path / "source", design))
    folder = ModelFolder.open(export_model(source, tmp_path / "out", precision="fp16", slot_set="all", route="fused"))
    assert {slot.scale for slot in folder.slots.values() if slot.site == "mlp_out"} == {2.0**-5}
    graph, model, patch = Graph(folder, "cpu"), load_model(source), patch_for(folder, scale=0.3)
    assert divergence(torch_logits(model, IDS), graph_logits(graph, IDS)) < 1e-4
    assert divergence(torch_logits(model, IDS, patch), graph_logits(graph, IDS, graph.bind(patch))) < 1e-4


def test_a_model_that_fits_is_not_scaled(tmp_path: Path) -> None:
    source = open_source(tiny_model(tmp_path / "source", "llama", num_hidden_layers=1))
    path = export_model(source, tmp_path / "out", precision="fp16")
    assert not any("scale" in slot for slot in json.loads((path / "patch_slots.json").read_text())["slots"])


@pytest.mark.parametrize(("largest", "scale"), [(32000.0, 1.0), (33000.0, 2.0**-4), (65536.0, 2.0**-5), (1e6, 2.0**-8)])
def test_the_scale_is_the_power_of_two_that_leaves_a_margin(largest: float, scale: float, tmp_path: Path) -> None:
    model = load_model(open_source(tiny_model(tmp_path / "source", "llama", num_hidden_layers=1)))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(0.0)
        model.model.embed_tokens.weight[5, 7] = -largest
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[0].get_submodule(name).weight.zero_()
    assert residual_scale(model, [1, 5, 6]) == scale

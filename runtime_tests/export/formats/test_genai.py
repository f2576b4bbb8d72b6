"""onnxruntime-genai on the exported folder: its config, the content of an adapter, and its tokens if installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import furthest, graph_logits, plain_session_logits, token_ids
from runtime_tests.patches import patch_for
from tp_export import cli
from tp_export.graph import export_model
from tp_export.source import open_source
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

IDS = [*token_ids(23), 5]  # genai would take a prompt that ends in the pad token for a padded one


def adapter(folder: Path, patch: Patch, out: Path) -> Path:
    patch.save(out.with_suffix(".safetensors"), dtype="f32")
    assert cli.main(["adapter", str(out.with_suffix(".safetensors")), str(folder), str(out)]) == 0
    return out


def parameters(file: Path) -> dict[str, np.ndarray]:
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))  # the adapter owns the memory of its values
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


@pytest.mark.parametrize("export", ["tiny_llama_export", "tiny_gemma_export"])
def test_the_config_names_the_inputs_and_outputs_of_the_graph(export: str, request: pytest.FixtureRequest) -> None:
    folder = ModelFolder.open(request.getfixturevalue(export))
    config = json.loads((folder.path / "genai_config.json").read_text())
    assert "genai_config.json" in folder.files
    decoder = config["model"]["decoder"]
    session = onnxruntime.InferenceSession(folder.path / decoder["filename"], providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    layers = range(decoder["num_hidden_layers"])
    wanted_in, wanted_out = decoder["inputs"], decoder["outputs"]
    past = [wanted_in[kind] % i for i in layers for kind in ("past_key_names", "past_value_names")]
    present = [wanted_out[kind] % i for i in layers for kind in ("present_key_names", "present_value_names")]
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids", *past}  # slots are not required inputs
    assert set(outputs) == {"logits", *present}
    assert inputs[past[0]].shape[1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]
    assert config["model"]["eos_token_id"] == [2] and config["model"]["bos_token_id"] == 1
    assert config["model"]["vocab_size"] == folder.vocab_size
    assert config["model"]["context_length"] == folder.context_window == config["search"]["max_length"]


def test_an_adapter_has_the_effect_of_the_patch(tiny_llama_export: Path, tmp_path: Path) -> None:
    """If ONNX Runtime feeds its values to the graph, without tp_runtime, the logits are those of the patch."""
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    patch = patch_for(graph.folder, rank=3, scale=0.3)
    values = parameters(adapter(tiny_llama_export, patch, tmp_path / "p.onnx_adapter"))
    got = plain_session_logits(tiny_llama_export, IDS, **values)[0]
    assert furthest(got, graph_logits(graph, IDS, graph.bind(patch))) < 1e-5
    assert furthest(got, graph_logits(graph, IDS)) > 0.01


def test_the_adapter_api_of_onnx_runtime_accepts_an_adapter(tiny_llama_export: Path, tmp_path: Path) -> None:
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    patch = patch_for(graph.folder, rank=3, scale=0.3)
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(adapter(tiny_llama_export, patch, tmp_path / "p.onnx_adapter")))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    session = onnxruntime.InferenceSession(tiny_llama_export / "model.onnx", providers=["CPUExecutionProvider"])
    folder = graph.folder
    empty = np.zeros((1, folder.kv.heads, 0, folder.kv.head_dim), np.float32)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(folder.layers) for kind in ("key", "value")}
    ids = np.array([IDS])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(IDS))[None], **past}
    got = session.run(["logits"], feed, options)[0][0]
    assert furthest(got, graph_logits(graph, IDS, graph.bind(patch))) < 1e-5


def test_an_adapter_replaces_the_folders_default_patch(tiny_gemma: Path, tmp_path: Path) -> None:
    source = open_source(tiny_gemma)
    plain = ModelFolder.open(export_model(source, tmp_path / "plain", slot_set="mlp"))
    default, other = patch_for(plain, seed=1, scale=0.3), patch_for(plain, seed=2, scale=0.3)
    folder = export_model(source, tmp_path / "patched", slot_set="mlp", patch=default)
    part = Patch({slot: delta for slot, delta in other.deltas.items() if slot[0] == 0}, other.config)
    values = parameters(adapter(folder, part, tmp_path / "p.onnx_adapter"))
    graph = Graph(plain, "cpu")
    assert furthest(plain_session_logits(folder, IDS, **values)[0], graph_logits(graph, IDS, graph.bind(part))) < 1e-5


def test_a_patch_of_another_base_and_a_wrong_file_name_are_refused(
    tiny_llama_export: Path, tiny_gemma_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch_for(ModelFolder.open(tiny_gemma_export)).save(tmp_path / "p.safetensors")
    arguments = ["adapter", str(tmp_path / "p.safetensors"), str(tiny_llama_export), str(tmp_path / "p.onnx_adapter")]
    assert cli.main(arguments) == 2
    assert "another base model" in capsys.readouterr().err
    assert cli.main([*arguments[:3], str(tmp_path / "p.npz")]) == 2
    assert "onnx_adapter" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("export", ["tiny_llama_export", "tiny_gemma_export"])
def test_genai_generates_the_same_tokens_as_the_runtime(
    export: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The base and a patch are decoded greedily. Install the extra `bench` for onnxruntime-genai."""
    og = pytest.importorskip("onnxruntime_genai")
    exported: Path = request.getfixturevalue(export)
    folder = ModelFolder.open(exported)
    patch = patch_for(folder, rank=3, scale=0.3)
    file = adapter(exported, patch, tmp_path / "p.onnx_adapter")
    ours = PatchedModel.from_pretrained(exported, device="cpu")
    model = og.Model(str(exported))
    adapters = og.Adapters(model)
    adapters.load(str(file), "p")
    for chosen in (None, patch):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(IDS) + 20)
        generator = og.Generator(model, parameters)
        if chosen is not None:
            generator.set_active_adapter(adapters, "p")
        generator.append_tokens(IDS)
        got = []
        for _ in range(20):
            if generator.is_done():
                break
            generator.generate_next_token()
            got.append(int(generator.get_next_tokens()[0]))
        ids = list(IDS)
        for token in got:
            with ours.patched(chosen):
                assert int(ours.logits(ids)[-1].argmax()) == token
            ids.append(token)
        assert got


def test_the_config_says_the_window_that_the_graph_has(tmp_path: Path) -> None:
    """The graph has the rotary tables of longrope for short texts only, so its window is not the one of the model."""
    source = open_source(tiny_model(tmp_path / "source", "phi3 longrope", num_hidden_layers=2))
    folder = ModelFolder.open(export_model(source, tmp_path / "export"))
    config = json.loads((folder.path / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == folder.context_window == 256

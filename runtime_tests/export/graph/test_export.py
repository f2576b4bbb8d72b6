"""Exports of tiny models: every architecture, errors, interruptions, and programs that do not know slots."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime_tests.codecs import codec_of
from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, graph_logits, plain_session_logits, token_ids
from runtime_tests.patches import patch_for
from tp_export.decoder.adapters import ADAPTERS
from tp_export.graph import export as model_export
from tp_export.graph import export_model
from tp_export.graph.windowed import separate_windowed
from tp_export.graph_check import check_description
from tp_export.source import load_model, open_source
from tp_runtime.errors import BaseMismatchError, ModelFormatError, OutputError, PatchShapeError, PatchTargetError
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import WINDOWED_SHIFT, WINDOWED_TOTAL, Graph, ModelFolder, Windowed

TOLERANCE = 1e-4
DESIGNS = [*ADAPTERS, "phi3 longrope", "gpt2 scaled by layer", "gpt_neox sequential"]
IDS = token_ids(64)
STEPS = (40, *(1,) * 24)

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A function from an architecture to its (source, export), made once; two of them are shared with other tests."""
    found: dict[str, Made] = {}

    def make(architecture: str) -> Made:
        if architecture not in found:
            shared = {"llama": "tiny_llama", "gemma3_text": "tiny_gemma"}.get(architecture)
            if shared:
                found[architecture] = request.getfixturevalue(shared), request.getfixturevalue(f"{shared}_export")
            else:
                root = tmp_path_factory.mktemp(architecture)
                # The layers of Gemma alternate; 2 layers are enough for the others.
                layers = 3 if architecture == "gemma2" else 2
                source = tiny_model(root / "source", architecture, num_hidden_layers=layers)
                found[architecture] = (
                    source,
                    export_model(open_source(source), root / "export", route="fused", slot_set="all"),
                )
        return found[architecture]

    return make


# -- architectures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", DESIGNS)
def test_logits_match_those_of_eager_attention(made: Callable[[str], Made], architecture: str) -> None:
    source, export = made(architecture)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    graph = Graph(ModelFolder.open(export), "cpu")
    assert graph.folder.architecture == architecture.partition(" ")[0] and graph.folder.route == "fused"
    wanted = torch_logits(model, IDS)
    assert furthest(graph_logits(graph, IDS), wanted) < TOLERANCE
    assert furthest(graph_logits(graph, IDS, chunks=STEPS), wanted) < TOLERANCE
    patch = patch_for(graph.folder, scale=0.3)
    patched = torch_logits(model, IDS, patch)
    assert furthest(patched, wanted) > 100 * TOLERANCE
    assert furthest(graph_logits(graph, IDS, graph.bind(patch), STEPS), patched) < TOLERANCE


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_every_weight_has_the_name_of_its_module(made: Callable[[str], Made], architecture: str) -> None:
    source, export = made(architecture)
    graph = onnx.load(export / "model.onnx", load_external_data=False).graph
    model = AutoModelForCausalLM.from_pretrained(source)
    known = {name for name, _ in model.named_parameters()} | {"lm_head.weight"}
    # products.py joins these weights.
    for first, joint in (("q_proj", "qkv_proj"), ("gate_proj", "gate_up_proj"), (".w1.", ".w1_w3.")):
        known |= {name.replace(first, joint) for name in known}
    weights = {i.name for i in graph.initializer if i.dims and min(i.dims) >= 16 and not i.name.startswith("tp.")}
    assert weights and weights <= known
    # The exporter reads the names from the metadata and then removes it.
    assert not any(node.metadata_props for node in graph.node)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_node_names_contain_the_module_and_the_slot(made: Callable[[str], Made], architecture: str) -> None:
    _source, export = made(architecture)
    names = [node.name for node in onnx.load(export / "model.onnx", load_external_data=False).graph.node]
    assert len(set(names)) == len(names) and not any(name.startswith("node_") for name in names)
    layer = {name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")}
    wanted = {"self_attn.GroupQueryAttention", "self_attn.qkv_proj.MatMul", "mlp.gate_up_proj.MatMul", "mlp.Mul"}
    assert wanted | {"mlp.gate_up_proj.Split", "mlp.down_proj.MatMul", "self_attn.o_proj.MatMul"} <= layer
    assert {"tp.1.mlp_out.MatMul", "tp.1.mlp_out.MatMul_2", "tp.1.mlp_out.Sum"} <= set(names)
    assert names[-1] in ("lm_head.MatMul", "lm_head.FusedMatMul")  # the second if the head is tied


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_each_module_reads_an_input_in_one_product(made: Callable[[str], Made], architecture: str) -> None:
    _source, export = made(architecture)
    graph = onnx.load(export / "model.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    read = [
        (node.input[0], node.input[1].removesuffix(".weight").rpartition(".")[0])
        for node in graph.node
        if node.op_type in ("MatMul", "FusedMatMul") and node.input[1] in weights
    ]
    assert read and len(set(read)) == len(read)


def test_soft_caps_and_windows_of_gemma2_are_in_the_graph(made: Callable[[str], Made]) -> None:
    """The test above would miss these if they had no effect on a tiny model, or if torch itself left them out."""
    source, _export = made("gemma2")
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    wanted = torch_logits(model, IDS)
    assert np.array_equal(torch_logits(load_model(open_source(source)), IDS), wanted)  # transformers' default is sdpa
    for change in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        options = {change: 64 if change == "sliding_window" else None}
        other = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", **options).eval()
        assert furthest(torch_logits(other, IDS), wanted) > 30 * TOLERANCE, change


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_graphs_with_full_and_windowed_layers_say_which_are_windowed(
    made: Callable[[str], Made], architecture: str
) -> None:
    """Models whose layers are all windowed, such as Mistral, have one cache length and say nothing."""
    folder = ModelFolder.open(made(architecture)[1])
    mixed = architecture in ("gemma2", "gemma3_text")
    assert folder.windowed == (Windowed((0, 2), 8) if mixed else None)
    session = Graph(folder, "cpu").session
    defaults = {value.name: value.shape for value in session.get_overridable_initializers()}
    assert (WINDOWED_SHIFT in defaults) is (WINDOWED_TOTAL in defaults) is mixed
    check_description(folder.path)


def test_a_model_that_mixes_kinds_by_its_config_has_windowed_layers(tmp_path: Path) -> None:
    layer_types = ["full_attention", "sliding_attention"]
    options = {"use_sliding_window": True, "sliding_window": 8, "layer_types": layer_types, "num_hidden_layers": 2}
    source = tiny_model(tmp_path / "source", "qwen2", **options)
    folder = ModelFolder.open(export_model(open_source(source), tmp_path / "export", route="fused"))
    assert folder.windowed == Windowed((1,), 8)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    assert furthest(graph_logits(Graph(folder, "cpu"), IDS, chunks=STEPS), torch_logits(model, IDS)) < TOLERANCE


def test_windows_of_different_lengths_are_refused() -> None:
    model = attention_graph(8, None, 9)
    with pytest.raises(ModelFormatError, match=r"sliding windows of different lengths; got \[8, 9\]"):
        separate_windowed(model)
    for windows in ((8, 8), (None, None)):
        assert separate_windowed(attention_graph(*windows)) is None


def attention_graph(*windows: int | None) -> ir.Model:
    """Return a graph with one attention operator for each layer and nothing else."""
    nodes = []
    for layer, window in enumerate(windows):
        inputs = [None, None, None, ir.Value(name=f"past_key_values.{layer}.key"), None, ir.Value(name="n"), None]
        attributes = {} if window is None else {"local_window_size": window}
        nodes.append(ir.node("GroupQueryAttention", inputs, attributes, domain="com.microsoft"))
    return ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": 20}), ir_version=10)


def test_a_rotary_table_that_depends_on_the_length_limits_the_context_window(made: Callable[[str], Made]) -> None:
    """With longrope, the graph has only the frequencies for short texts; transformers changes them for longer ones."""
    source, export = made("phi3 longrope")
    folder = ModelFolder.open(export)
    assert folder.context_window == 256
    model = load_model(open_source(source))
    ids = token_ids(257)
    assert furthest(graph_logits(Graph(folder, "cpu"), ids[:256]), torch_logits(model, ids[:256])) < TOLERANCE
    assert furthest(torch_logits(model, ids)[:256], torch_logits(model, ids[:256])) > 30 * TOLERANCE


@pytest.mark.parametrize("design", ["llama", "mixtral", "phi3 longrope"])
def test_an_interrupted_trace_does_not_change_the_model(design: str, tmp_path: Path) -> None:
    source = open_source(tiny_model(tmp_path, design))
    model = load_model(source)
    before = torch_logits(model, IDS)
    modules, attention = [name for name, _ in model.named_modules()], model.config._attn_implementation

    def interrupted(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Embedding, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model_export.trace(model, model_export.slots_of(model, "all"))
    assert [name for name, _ in model.named_modules()] == modules
    assert model.config._attn_implementation == attention
    assert not any("forward" in vars(module) for module in model.modules())
    assert np.array_equal(torch_logits(model, IDS), before)


# -- programs that do not know slots -------------------------------------------------------------------------


def test_a_batch_can_have_one_patch_or_one_per_row(tiny_llama_export: Path) -> None:
    folder = ModelFolder.open(tiny_llama_export)
    graph = Graph(folder, "cpu")
    rows = [token_ids(20, seed=seed) for seed in (1, 2)]
    patches = [patch_for(folder, seed=seed, rank=3, scale=0.3) for seed in (1, 2)]
    bound = [{name: value.numpy() for name, value in graph.bind(patch).values.items()} for patch in patches]
    shared = plain_session_logits(folder.path, rows, **bound[0])
    own = plain_session_logits(
        folder.path, rows, **{name: np.concatenate([b[name] for b in bound]) for name in bound[0]}
    )
    for row in range(2):
        assert furthest(shared[row], graph_logits(graph, rows[row], graph.bind(patches[0]))) < TOLERANCE
        assert furthest(own[row], graph_logits(graph, rows[row], graph.bind(patches[row]))) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_optimum_loads_the_folder_and_generates_the_same_tokens_as_transformers(
    made: Callable[[str], Made], architecture: str
) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    source, export = made(architecture)
    prompt = torch.tensor([[5, 77, 130, 9, 200]])
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    torch_model = AutoModelForCausalLM.from_pretrained(source)
    wanted = torch_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()
    model = ORTModelForCausalLM.from_pretrained(export)
    assert model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist() == wanted
    assert len(wanted) == 29


def test_the_folder_contains_the_tokenizer_and_configs_of_the_source(made: Callable[[str], Made]) -> None:
    source, export = made("llama")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (export / name).read_bytes() == (source / name).read_bytes()
    assert set(ModelFolder.open(export, verify=True).files) == {path.name for path in export.iterdir()} - {
        "patch_slots.json"
    }
    assert codec_of(export).render("Hi") == codec_of(source).render("Hi")


# -- errors and interruptions --------------------------------------------------------------------------------


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a trace fail the test, because bad input must be refused before this expensive part."""

    def trace(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(model_export, "trace", trace)


def fitting(made: Callable[[str], Made]) -> tuple[Any, Patch]:
    source, export = made("llama")
    return open_source(source), patch_for(ModelFolder.open(export))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(("option", "got"), [("precision", "fp8"), ("route", "sideways"), ("slot_set", "some")])
def test_an_unknown_option_is_refused(made: Callable[[str], Made], tmp_path: Path, option: str, got: str) -> None:
    with pytest.raises(ModelFormatError) as error:
        export_model(fitting(made)[0], tmp_path / "out", **{option: got})  # type: ignore[arg-type]
    assert (error.value.field, error.value.got) == (option, got)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("untraced")
def test_a_patch_that_does_not_fit_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    source, patch = fitting(made)
    delta = patch.deltas[0, "mlp_out"]
    bad = {
        "digest": (BaseMismatchError, Patch(patch.deltas, replace(patch.config, base_digest="0" * 64))),
        "precision": (BaseMismatchError, Patch(patch.deltas, replace(patch.config, precision="int4"))),
        "site": (PatchTargetError, Patch({(0, "gate"): delta}, patch.config)),
        "layer": (PatchShapeError, Patch({(3, "mlp_out"): delta}, patch.config)),
        "shape": (PatchShapeError, Patch({(0, "mlp_out"): Delta(bias=np.ones(7))}, patch.config)),
    }
    for error, wrong in bad.values():
        with pytest.raises(error):
            export_model(source, tmp_path / "out", patch=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("untraced")
def test_an_existing_folder_is_refused_and_not_changed(made: Callable[[str], Made], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for taken in (out, out / "notes.txt"):
        with pytest.raises(OutputError):
            export_model(fitting(made)[0], taken)
    assert [path.name for path in out.iterdir()] == ["notes.txt"] and (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("trace", KeyboardInterrupt()),
        ("save", KeyboardInterrupt()),
        ("save", OSError(28, "No space left on device")),
        ("check_export", KeyboardInterrupt()),
    ],
)
def test_an_interruption_leaves_no_new_folder_and_keeps_the_old_one(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Any
) -> None:
    """With `overwrite`, the old folder exists until the new one is complete."""
    out = shutil.copytree(made("llama")[1], tmp_path / "out")
    old = sorted(path.name for path in out.iterdir())

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    if stage == "trace":
        monkeypatch.setattr(model_export, "trace", fail)
    else:  # an empty graph replaces the earlier stages, which this test does not check
        monkeypatch.setattr(model_export, "_trace", lambda *_args: (None, "fused"))
        for step in ("name_weights", "name_vectors", "name_dimensions", "name_nodes"):
            monkeypatch.setattr(model_export, step, lambda *_args: None)
        monkeypatch.setattr(model_export, "separate_windowed", lambda *_args: None)
        monkeypatch.setattr(model_export, "add_first_logit", lambda *_args: None)
        monkeypatch.setattr(model_export, "simplify", lambda *_args: None)
        monkeypatch.setattr(model_export, "make_slots_overridable", lambda *_args: [])

        def save(_graph: Any, folder: Path, _values: Any) -> list[str]:
            (folder / "model.onnx").write_bytes(b"half")
            return fail() if stage == "save" else ["model.onnx"]  # type: ignore[func-returns-value]

        monkeypatch.setattr(model_export, "save_graph", save)
        monkeypatch.setattr(model_export, "check_export", fail)
    with pytest.raises(type(error)):
        export_model(fitting(made)[0], out, route="fused", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == old

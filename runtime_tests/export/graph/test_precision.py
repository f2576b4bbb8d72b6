"""Exports in every precision, patches that are fitted for one precision, and repaired folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from runtime_tests.export.graph.precisions import IDS, QUESTIONS, TEXTS, divergence, logits, model_logits
from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import graph_logits
from runtime_tests.patches import patch_for
from tp_export.fit import Recipe, make_patch, student_for
from tp_export.graph import export_model, stored_student
from tp_export.measure import RuntimeStudent, TorchStudent, measure_fidelity
from tp_export.quantise import INT4, QuantisedStudent, float_weights, quantised
from tp_export.rollout import Prompting, dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import BaseMismatchError, CalibrationError, ModelFormatError
from tp_runtime.patch import FLOAT_PRECISIONS, Patch
from tp_runtime.session import DEFAULT_FILE, Graph, ModelFolder

PRECISIONS = ("fp16", "bf16", "int8", "int4-rtn", "int4-symmetric", "int4-symmetric-head4", "int4-rtn-fp16")
IN_FLOAT16 = ("fp16", "int4-rtn-fp16")


@pytest.fixture(scope="module")
def folders(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported folders, by precision."""
    root = tmp_path_factory.mktemp("precisions")
    return {p: export_model(source, root / p, precision=p, route="fused") for p in ("fp32", *PRECISIONS)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_computes_with_its_quantised_weights(
    folders: dict[str, Path], model: Any, precision: str
) -> None:
    exact = wanted = model_logits(model)
    if precision not in FLOAT_PRECISIONS:
        with QuantisedStudent.of(model, quantised(precision)).whole():
            wanted = model_logits(model)
    got, is_int4 = logits(folders[precision]), precision.startswith("int4")
    # Only the rounding of activations is left, in int4 a fraction of the loss of the weights.
    assert divergence(wanted, got) < (0.1 * divergence(wanted, exact) if is_int4 else 1e-4)
    assert divergence(exact, got) < (0.005 if is_int4 else 1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_patch_fitted_in_float_works_in_each_precision(folders: dict[str, Path], precision: str) -> None:
    patch = patch_for(ModelFolder.open(folders["fp32"]), scale=0.3)
    exact, patched = logits(folders["fp32"]), logits(folders["fp32"], patch)
    got = logits(folders[precision], patch)
    assert divergence(patched, got) < 0.3 * divergence(patched, exact)


def test_the_tied_embedding_is_stored_once(folders: dict[str, Path]) -> None:
    graph = onnx.load(folders["int4-rtn"] / "model.onnx", load_external_data=False).graph
    lookup = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    head = [node for node in graph.node if node.op_type == "MatMulNBits"][-1]
    assert lookup.input[0] == head.input[1] == "lm_head.weight.packed"
    big = [tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert not [name for name in big if name.endswith(("proj.weight", "head.weight"))]


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "mixtral", "qwen3_moe"])
def test_no_linear_layer_is_left_in_float32(architecture: str, tmp_path: Path) -> None:
    """Conv1D, experts and a head with a soft cap are traced differently. An expert that no token chose has no rows."""
    source = open_source(tiny_model(tmp_path / "source", architecture, hidden_size=64))
    folder = export_model(source, tmp_path / "out", precision="int4-rtn", route="fused")
    model = load_model(source)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    in_float32 = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and tensor.name.endswith(".weight")
    }
    assert in_float32 <= float_weights(model) | {"transformer.wpe.weight"}
    assert not any(node.op_type == "Gemm" for node in graph.node)
    exact = model_logits(model)
    with QuantisedStudent.of(model, quantised("int4-rtn")).whole():
        wanted = model_logits(model)
    steps = graph_logits(Graph(ModelFolder.open(folder), "cpu"), IDS, chunks=[1] * len(IDS))
    assert divergence(wanted, torch.from_numpy(steps)) < 0.1 * divergence(wanted, exact)


def test_the_size_of_an_export_follows_its_precision(folders: dict[str, Path]) -> None:
    sizes = {p: (folder / "model.onnx_data").stat().st_size for p, folder in folders.items()}
    assert sizes["fp16"] < 0.55 * sizes["fp32"] and sizes["bf16"] < 0.55 * sizes["fp32"]
    assert sizes["int4-rtn"] < 0.7 * sizes["int8"] < 0.3 * sizes["fp32"]


@pytest.mark.parametrize("precision", IN_FLOAT16)
def test_slots_and_cache_of_a_graph_in_float16_are_float16(folders: dict[str, Path], precision: str) -> None:
    assert ModelFolder.open(folders[precision]).kv.dtype == "f16"
    graph = onnx.load(folders[precision] / "model.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert kinds["tp.0.mlp_out.a"] == kinds["past_key_values.0.key"] == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("precision", ["fp16", "int4-fp16", "int4-rtn-fp16"])
def test_float16_without_fused_operators_is_refused(source: Source, tmp_path: Path, precision: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"cannot run in float16.*got {precision}"):
        export_model(source, tmp_path / "out", precision=precision, route="optimum")


@pytest.mark.parametrize("precision", ["int8", "int4-rtn", "int4-symmetric", "int4-symmetric-head4", "int4-gptq"])
def test_the_optimum_route_quantises_as_the_fused_route_does(
    folders: dict[str, Path], source: Source, tmp_path: Path, precision: str
) -> None:
    found = {
        route: logits(export_model(source, tmp_path / route, precision=precision, route=route))
        for route in ("fused", "optimum")
    }
    assert divergence(found["fused"], found["optimum"]) < 0.1 * divergence(found["fused"], logits(folders["fp32"]))


# -- int4 weights with float16 activations ---------------------------------------------------------------------


def test_int4_fp16_loses_at_most_what_fp16_and_int4_lose(folders: dict[str, Path], model: Any) -> None:
    """Against the float32 graph it loses what the weights lose, which torch measures, and what fp16 alone loses."""
    exact = logits(folders["fp32"])
    with QuantisedStudent.of(model, quantised("int4-rtn")).whole(), torch.no_grad():
        weights = divergence(exact, model(torch.tensor([IDS])).logits[0])
    found = {precision: divergence(exact, logits(folders[precision])) for precision in IN_FLOAT16}
    assert abs(found["int4-rtn-fp16"] - weights) < 0.02 * weights + 10 * found["fp16"]


def test_int4_fp16_stores_scales_in_float16_and_leaves_activations_to_the_device(folders: dict[str, Path]) -> None:
    model = onnx.load(folders["int4-rtn-fp16"] / "model.onnx", load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    levels = {attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert products and levels == {0}
    assert {kinds[node.input[2]] for node in products} == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.FLOAT not in {kinds[name] for name in kinds if name.endswith(("scales", "weight"))}


def test_prompts_steps_and_batches_of_int4_fp16_give_the_same_logits(folders: dict[str, Path]) -> None:
    graph = Graph(ModelFolder.open(folders["int4-rtn-fp16"]), "cpu")
    at_once = graph_logits(graph, IDS)
    for chunks in ([1] * len(IDS), [20, 1, 19]):
        steps = graph_logits(graph, IDS, chunks=chunks)
        assert divergence(torch.from_numpy(at_once), torch.from_numpy(steps)) < 1e-3


# -- students ------------------------------------------------------------------------------------------------


def test_the_student_restores_the_weights_of_the_model(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    student = QuantisedStudent.of(model, quantised("int4-rtn"))
    with student.whole():
        assert not torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_student_of_a_float_precision_is_the_model(source: Source, model: Any) -> None:
    assert student_for(source, model, "fp16") is None


def test_weights_that_are_not_calibrated_have_no_digest(folders: dict[str, Path], model: Any) -> None:
    assert stored_student(model, ModelFolder.open(folders["fp32"])) is None
    nearest = stored_student(model, ModelFolder.open(folders["int4-rtn"]))
    assert nearest is not None and nearest.weights_digest is None


def test_int4_is_the_quantiser_with_the_least_loss(
    source: Source, model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tp_export.fit.student.calibration_texts", lambda *_arguments: TEXTS)
    student = student_for(source, model, "int4")
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if "KL to float32" in line]
    losses = {words[0].rstrip(":"): float(words[4]) for words in lines}
    assert student is not None and list(losses) == list(INT4)
    assert losses[student.precision] == min(losses.values())


def test_a_patch_needs_a_prompt_or_a_student_precision(source: Source, model: Any) -> None:
    with pytest.raises(CalibrationError, match="student-precision"):
        make_patch(source, model, None, QUESTIONS[:4], [], Recipe(), name="nothing")


@pytest.fixture(scope="module")
def repair(source: Source, model: Any) -> Patch:
    recipe = Recipe(student_precision="int4-rtn", max_new_tokens=16)
    return make_patch(source, model, None, QUESTIONS[:14], QUESTIONS[14:], recipe, name="repair")


def test_a_repair_closes_part_of_the_quantisation_loss(repair: Patch) -> None:
    assert repair.config.precision == "int4-rtn" and repair.config.context_digest == ""
    assert repair.config.fidelity is not None and repair.config.fidelity["gap_closed"] > 0.2


@pytest.mark.parametrize("precision", ["int4-rtn", "int4-rtn-fp16"])
def test_a_repair_closes_part_of_the_gap_of_the_exported_graph(
    repair: Patch, folders: dict[str, Path], source: Source, model: Any, precision: str
) -> None:
    """A patch that is fitted for int4 runs on int4-fp16 too, which has the same weights."""
    graph = Graph(ModelFolder.open(folders[precision]), "cpu")
    dialogues = dialogues_for(model, Prompting(source.codec, None), QUESTIONS[14:], 16)
    students = RuntimeStudent(graph), RuntimeStudent(graph, repair)
    assert measure_fidelity(dialogues, TorchStudent(model), *students).gap_closed > 0.2


def test_a_patch_fitted_for_int4_fp16_names_the_weights(source: Source, model: Any) -> None:
    student = student_for(source, model, "int4-rtn-fp16")
    assert student is not None and (student.name, student.precision) == ("int4-rtn-fp16", "int4-rtn")


def test_a_repair_of_another_precision_is_refused(repair: Patch, folders: dict[str, Path]) -> None:
    for other in ("fp32", "fp16", "int8", "int4-symmetric"):
        with pytest.raises(BaseMismatchError, match="int4-rtn"):
            logits(folders[other], repair)


def test_one_patch_can_contain_a_prompt_and_the_repair(source: Source, model: Any) -> None:
    recipe = Recipe(student_precision="int4-rtn", max_new_tokens=16)
    patch = make_patch(source, model, "Talk like a pirate.", QUESTIONS[:14], QUESTIONS[14:], recipe, name="pirate")
    assert patch.config.context_digest and patch.config.precision == "int4-rtn"
    assert patch.config.fidelity is not None and patch.config.fidelity["gap_closed"] > 0


# -- repaired folders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repaired(source: Source, repair: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tp_export.graph.export.repair_patch", lambda *_arguments: repair)
        out = tmp_path_factory.mktemp("repaired") / "int4"
        return export_model(source, out, precision="int4-rtn", route="fused", repair=True)


def test_the_base_of_a_repaired_folder_includes_the_repair(
    repaired: Path, folders: dict[str, Path], repair: Patch
) -> None:
    assert (repaired / DEFAULT_FILE).is_file()
    wanted = logits(folders["int4-rtn"], repair)
    assert torch.equal(logits(repaired), wanted)
    graph = Graph(ModelFolder.open(repaired), "cpu")
    assert torch.equal(torch.from_numpy(graph.run(IDS, graph.default)), wanted)
    assert graph.base.key[1] == repair.terms


def test_float_patches_are_added_to_the_repair(repaired: Path, folders: dict[str, Path], repair: Patch) -> None:
    context = patch_for(ModelFolder.open(folders["fp32"]), scale=0.3)
    graph = Graph(ModelFolder.open(repaired), "cpu")
    bound = graph.bind(context)
    assert bound.key[1] == (*repair.terms, *context.terms)
    both = logits(folders["int4-rtn"], repair + context)
    assert np.abs(graph.run(IDS, bound) - both.numpy()).max() < 1e-4


def test_patches_fitted_for_the_precision_replace_the_repair(
    repaired: Path, folders: dict[str, Path], repair: Patch
) -> None:
    graph = Graph(ModelFolder.open(repaired), "cpu")
    own = Patch({key: delta.scaled(0.5) for key, delta in repair.deltas.items()}, repair.config)
    assert graph.bind(own).key[1] == own.terms
    assert torch.equal(torch.from_numpy(graph.run(IDS, graph.bind(own))), logits(folders["int4-rtn"], own))


def test_strength_zero_is_the_repaired_base(repaired: Path, repair: Patch) -> None:
    graph = Graph(ModelFolder.open(repaired), "cpu")
    assert graph.bind(0.0 * repair) is graph.base


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "int8", "patch": "one"}])
def test_a_repair_of_a_float_export_or_together_with_a_patch_is_refused(
    source: Source, tmp_path: Path, repair: Patch, options: dict[str, Any]
) -> None:
    if "patch" in options:
        options = {**options, "patch": patch_for(ModelFolder.open(_any(source, tmp_path)))}
    with pytest.raises(ModelFormatError, match="repair"):
        export_model(source, tmp_path / "out", repair=True, **options)


def _any(source: Source, tmp_path: Path) -> Path:
    return export_model(source, tmp_path / "any", route="fused")


def test_rotary_tables_are_computed_from_frequencies(folders: dict[str, Path]) -> None:
    graph = onnx.load(folders["fp32"] / "model.onnx", load_external_data=False).graph
    assert {node.op_type for node in graph.node} & {"Cos", "Sin"} == {"Cos", "Sin"}
    assert not any(node.op_type in ("RotaryEmbedding", "Transpose") for node in graph.node)
    # Queries, keys and values are packed in the first input.
    assert all(node.input[1] == "" for node in graph.node if node.op_type == "GroupQueryAttention")

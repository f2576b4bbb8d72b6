"""The check of an export against torch: real text, a limit for each precision, and the graphs that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, graph_logits, token_ids
from tp_export.graph import export as model_export
from tp_export.graph import export_model, optimum_route, stored_student
from tp_export.graph.parity import Parity, check_export, measure_parity
from tp_export.quantise import held_out_text
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.session import Graph, ModelFolder

PRECISIONS = ("fp32", "bf16", "int8", "int4-rtn", "int4-rtn-fp16")


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Source:
    """The base model of every folder here."""
    return open_source(tiny_llama)


@pytest.fixture(scope="module")
def folders(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported folders, by precision."""
    root = tmp_path_factory.mktemp("parity")
    return {p: export_model(source, root / p, precision=p, route="fused") for p in PRECISIONS}


def checked(source: Source, model: Any, folder: Path) -> Parity | None:
    """Check a folder against a model in the folder's precision."""
    return check_export(source.codec, model, folder, stored_student(model, ModelFolder.open(folder)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_right_export_agrees_and_the_check_says_what_it_measured(
    source: Source, folders: dict[str, Path], precision: str
) -> None:
    parity = checked(source, load_model(source), folders[precision])
    assert parity is not None and parity.agrees and parity.precision == precision
    assert parity.kl < parity.limit / 2
    assert str(parity).startswith(f"{precision} on 64 tokens of built-in text: KL ")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_export_that_does_not_compute_the_model_is_refused(
    source: Source, folders: dict[str, Path], precision: str
) -> None:
    model = load_model(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.neg_()
    with pytest.raises(ModelFormatError, match=rf"does not compute .* got {precision} on 64 tokens .* of at most"):
        checked(source, model, folders[precision])


def test_one_wrong_weight_of_a_float32_graph_is_noticed(source: Source, folders: dict[str, Path]) -> None:
    model = load_model(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 3
    with pytest.raises(ModelFormatError, match="does not compute"):
        checked(source, model, folders["fp32"])


def test_the_check_reads_prose(source: Source, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On random ids, the rounding of activations costs so much that some processors refused a right export."""
    graph = Graph(ModelFolder.open(folders["int4-rtn"]), "cpu")
    read: list[list[int]] = []
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda ids, bound: read.append(list(ids)) or run(ids, bound))
    measure_parity(source.codec, load_model(source), graph, None)
    assert held_out_text().startswith(source.codec.decode(read[0]))


def test_a_tokenizer_without_tokens_of_the_prose_is_checked_on_its_own_ids(
    source: Source, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise RequestError("the prompt is empty", field="messages")

    monkeypatch.setattr(source.codec, "render", refuse)
    parity = checked(source, load_model(source), folders["fp32"])
    assert parity is not None and parity.agrees and parity.tokens == 64


def test_logits_that_are_not_numbers_do_not_agree(
    source: Source, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(source)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for precision in PRECISIONS:
        with pytest.raises(ModelFormatError, match="does not compute"):
            checked(source, model, folders[precision])


def test_a_graph_that_onnx_runtime_cannot_run_is_refused(
    source: Source, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise RuntimeError("Non-zero status code\nand a page of advice")

    monkeypatch.setattr(Graph, "run", refuse)
    with pytest.raises(ModelFormatError, match="cannot run the exported graph; got RuntimeError: Non-zero status"):
        checked(source, load_model(source), folders["fp32"])


@pytest.mark.parametrize("head_dim", [4, 12, 20])
def test_a_head_size_that_the_operator_refuses_takes_the_other_route(
    head_dim: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model(tmp_path / "source", "llama", hidden_size=4 * head_dim, head_dim=head_dim, num_hidden_layers=2)
    source = open_source(folder)
    export = ModelFolder.open(export_model(source, tmp_path / "auto"))
    assert export.route == "optimum" and export.kv.head_dim == head_dim
    assert "does not take this head size" in capsys.readouterr().err
    ids = token_ids(20)
    assert furthest(graph_logits(Graph(export, "cpu"), ids), torch_logits(load_model(source), ids)) < 1e-4
    with pytest.raises(ModelFormatError, match=rf"head size; got {head_dim}; wanted a multiple of 8"):
        export_model(source, tmp_path / "fused", route="fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("route", ["auto", "optimum"])
def test_fp16_is_refused_before_optimum_s_trace_with_the_reason(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only fused operators run in fp16, so the trace, which takes minutes for a large model, would be in vain."""
    monkeypatch.setattr(optimum_route, "trace", lambda *_: pytest.fail("traced"))
    source = open_source(tiny_model(tmp_path / "source", "llama", hidden_size=48, head_dim=12, num_hidden_layers=1))
    reason = "does not take this head size" if route == "auto" else "the route optimum has none"
    with pytest.raises(ModelFormatError, match=rf"without fused operators cannot run in float16: .*{reason}"):
        export_model(source, tmp_path / "out", precision="fp16", route=route)
    assert not (tmp_path / "out").exists()


def test_a_long_text_before_the_trace_does_not_change_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With longrope, transformers keeps the frequencies of the last text's length in the model."""
    source = open_source(tiny_model(tmp_path / "source", "phi3 longrope", num_hidden_layers=2))
    model, ids = load_model(source), token_ids(300)
    wanted = torch_logits(model, ids[:64])
    torch_logits(model, ids)
    monkeypatch.setattr(model_export, "load_model", lambda _source: model)
    graph = Graph(ModelFolder.open(export_model(source, tmp_path / "export", route="fused")), "cpu")
    assert furthest(graph_logits(graph, ids[:64]), wanted) < 1e-4


@pytest.mark.parametrize("route", ["fused", "auto"])
def test_a_config_that_states_another_head_size_than_the_model_has_is_refused(route: str, tmp_path: Path) -> None:
    """GPT-2 ignores `head_dim`: its heads have the width of the model divided by their number."""
    source = open_source(tiny_model(tmp_path / "source", "gpt2", hidden_size=96, head_dim=16, num_hidden_layers=2))
    with pytest.raises(ModelFormatError, match=r"another shape than its config states|contradict patch_slots"):
        export_model(source, tmp_path / "export", route=route)
    assert not (tmp_path / "export").exists()

"""The fallback route: optimum's graph has the same slots, names and logits as the fused one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from runtime_tests.export.tiny import VARIANTS, tiny_model
from runtime_tests.patches import random_config, random_patch
from tp_export.decoder import SLOT_SETS, patched, slots_of
from tp_export.decoder.adapters import ADAPTERS
from tp_export.graph import export as model_export
from tp_export.graph import export_model
from tp_export.graph import optimum_route as onnx_optimum
from tp_export.graph import slots as onnx_slots
from tp_export.graph.optimum_route import trace
from tp_export.source import load_model, open_source
from tp_runtime.errors import ModelFormatError, StaleCacheError
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import Graph, ModelFolder

IDS = np.random.default_rng(1).integers(3, 259, 64).tolist()


@pytest.fixture(scope="module", params=["llama", "gemma"])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A torch model and its export with every slot. Gemma has post-norms, sliding layers and a tied head."""
    source = open_source(request.getfixturevalue(f"tiny_{request.param}"))
    folder = tmp_path_factory.mktemp("optimum") / request.param
    return load_model(source), export_model(source, folder, slot_set="all", route="optimum")


@pytest.fixture(scope="module")
def model(case: tuple[Any, Path]) -> Any:
    return case[0]


@pytest.fixture(scope="module")
def graph(case: tuple[Any, Path]) -> Graph:
    return Graph(ModelFolder.open(case[1]), device="cpu")


def _torch_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def _patch(graph: Graph, seed: int = 0) -> Patch:
    """Return a patch of every slot, with ranks from 0 to 2."""
    rng = np.random.default_rng(seed)
    deltas = {}
    for i, (key, slot) in enumerate(graph.folder.slots.items()):
        rank = i % 3
        pair = (
            (
                rng.standard_normal((slot.inputs, rank)).astype(np.float32) / slot.inputs**0.5,
                rng.standard_normal((rank, slot.outputs)).astype(np.float32) * 0.3,
            )
            if rank
            else (None, None)
        )
        deltas[key] = Delta(*pair, 0.1 * rng.standard_normal(slot.outputs).astype(np.float32))
    return Patch(deltas, random_config(base_digest=graph.folder.base_digest))


def _in_chunks(graph: Graph, bound: Any, sizes: list[int]) -> NDArray[np.float32]:
    cache, rows, start = graph.new_cache(bound), [], 0
    for size in sizes:
        rows.append(graph.forward(IDS[start : start + size], cache, bound, all_logits=True))
        start += size
    assert cache.tokens == IDS[:start]
    return np.concatenate(rows)


@pytest.mark.parametrize("sizes", [[64], [1, 20, 3, 40], [1] * 64], ids=["prefill", "chunked", "token by token"])
def test_the_unpatched_graph_matches_the_model(model: Any, graph: Graph, sizes: list[int]) -> None:
    assert np.abs(_in_chunks(graph, graph.base, sizes) - _torch_logits(model, IDS)).max() < 1e-4


@pytest.mark.parametrize("sizes", [[64], [1, 20, 3, 40], [1] * 64], ids=["prefill", "chunked", "token by token"])
def test_a_patched_graph_matches_the_model_with_hooks(model: Any, graph: Graph, sizes: list[int]) -> None:
    patch = _patch(graph)
    got = _in_chunks(graph, graph.bind(patch), sizes)
    with patched(model, patch):
        wanted = _torch_logits(model, IDS)
    assert np.abs(wanted - _torch_logits(model, IDS)).max() > 0.5  # the patch has an effect
    assert np.abs(got - wanted).max() < 2e-4


@pytest.mark.parametrize("design", sorted({*ADAPTERS, *VARIANTS} - {"llama", "gemma3_text", "mixtral"}))
def test_other_block_designs_match_the_model(design: str, tmp_path: Path) -> None:
    source = open_source(tiny_model(tmp_path / "source", design))
    model = load_model(source)
    folder = ModelFolder.open(export_model(source, tmp_path / "export", slot_set="all", route="optimum"))
    graph = Graph(folder, device="cpu")
    sizes = [40, *[1] * 24]
    assert np.abs(_in_chunks(graph, graph.base, sizes) - _torch_logits(model, IDS)).max() < 1e-4
    patch = _patch(graph)
    with patched(model, patch):
        wanted = _torch_logits(model, IDS)
    assert np.abs(wanted - _torch_logits(model, IDS)).max() > 0.3  # the patch has an effect
    assert np.abs(_in_chunks(graph, graph.bind(patch), sizes) - wanted).max() < 2e-4


def test_an_architecture_without_a_configuration_in_optimum_is_refused(tmp_path: Path) -> None:
    """Mixtral can be exported only through the fused route, and the error states this in one line."""
    source = open_source(tiny_model(tmp_path / "source", "mixtral"))
    with pytest.raises(ModelFormatError, match=r"got mixtral; .*--route fused"):
        export_model(source, tmp_path / "export", route="optimum")
    assert not (tmp_path / "export").exists()


def test_unbound_slots_give_exactly_the_base(model: Any, graph: Graph, tmp_path: Path) -> None:
    """Rank 0 as the default, bound explicitly, or after a patch gives exactly the logits of a graph without slots."""
    before = _in_chunks(graph, graph.base, [64])
    bare = trace(model, [])
    onnx_slots.save_graph(bare, tmp_path, [])
    feeds = {
        "input_ids": np.array([IDS]),
        "attention_mask": np.ones((1, 64), np.int64),
        "position_ids": np.arange(64)[None],
    }
    for i in range(graph.folder.layers):
        for part in ("key", "value"):
            feeds[f"past_key_values.{i}.{part}"] = np.zeros((1, 2, 0, 16), np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["logits"], feeds)[0][0], before)
    _in_chunks(graph, graph.bind(_patch(graph)), [64])
    assert np.array_equal(_in_chunks(graph, graph.base, [64]), before)
    nothing = Patch(
        {key: Delta(bias=np.zeros(slot.outputs, np.float32)) for key, slot in graph.folder.slots.items()},
        random_config(base_digest=graph.folder.base_digest),
    )
    assert np.array_equal(_in_chunks(graph, graph.bind(nothing), [64]), before)


def test_only_the_last_logits_are_returned_by_default(graph: Graph) -> None:
    every = graph.forward(IDS, graph.new_cache(graph.base), graph.base, all_logits=True)
    last = graph.forward(IDS, graph.new_cache(graph.base), graph.base)
    assert last.shape == (1, every.shape[1])
    assert np.abs(last[0] - every[-1]).max() < 1e-5


def test_inputs_and_outputs_have_the_names_of_the_fused_graph(model: Any, case: tuple[Any, Path], request: Any) -> None:
    graph = Graph(ModelFolder.open(case[1]), device="cpu")
    inputs = {value.name for value in graph.session.get_inputs()}
    layers = range(graph.folder.layers)
    assert inputs == {"input_ids", "attention_mask", "position_ids"} | {
        f"past_key_values.{i}.{part}" for i in layers for part in ("key", "value")
    }
    slots = {f"{slot.name}.{part}" for slot in graph.folder.slots.values() for part in ("a", "b", "bias")}
    overridable = {value.name for value in graph.session.get_overridable_initializers()}
    assert overridable == slots | {"tp.first_logit"}
    outputs = [value.name for value in graph.session.get_outputs()]
    assert outputs == ["logits", *(f"present.{i}.{part}" for i in layers for part in ("key", "value"))]
    assert graph.folder.route == "optimum"


def test_weights_keep_their_names_and_are_stored_once(model: Any) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    exported = trace(model, slots_of(model, "all"))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert "forward" not in vars(model)
    large = {name: value for name, value in exported.graph.initializers.items() if len(value.const_value.shape) == 2}
    wanted = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert set(large) == wanted


def test_a_rewound_cache_continues_from_the_kept_tokens(graph: Graph) -> None:
    for bound in (graph.base, graph.bind(_patch(graph))):
        cache = graph.new_cache(bound)
        graph.forward(IDS[:40], cache, bound)
        other = [*IDS[:25], 7, 8, 9]
        assert cache.keep_prefix(other) == 25
        got = graph.forward(other[25:], cache, bound)
        wanted = graph.forward(other, graph.new_cache(bound), bound)
        assert np.abs(got - wanted).max() < 1e-4
        assert cache.keep_prefix([1, 2]) == 0
        got = graph.forward(IDS[:5], cache, bound)
        assert np.abs(got - graph.forward(IDS[:5], graph.new_cache(bound), bound)).max() < 1e-4


def test_a_cache_belongs_to_its_patch(graph: Graph) -> None:
    cache = graph.new_cache(graph.base)
    graph.forward(IDS[:4], cache, graph.base)
    with pytest.raises(StaleCacheError):
        graph.forward([5], cache, graph.bind(_patch(graph)))
    assert cache.tokens == IDS[:4]


def test_a_failed_run_does_not_change_the_cache(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = graph.new_cache(graph.base)
    graph.forward(IDS[:10], cache, graph.base)

    class Failing:
        def run_with_iobinding(self, _binding: Any) -> None:
            raise RuntimeError("device lost")

    with monkeypatch.context() as during:
        during.setattr(graph, "session", Failing())
        with pytest.raises(RuntimeError, match="device lost"):
            graph.forward([5], cache, graph.base)
    got = graph.forward(IDS[10:12], cache, graph.base)
    wanted = graph.forward(IDS[:12], graph.new_cache(graph.base), graph.base)
    assert np.abs(got - wanted).max() < 1e-4


def test_an_exported_default_patch_is_active_by_default(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_source(tiny_llama)
    model = load_model(source)
    outputs, inputs = model.model.layers[0].mlp.down_proj.weight.shape
    config = random_config(base_digest=source.digest)
    patch = random_patch(layers=3, inputs=inputs, outputs=outputs, scale=0.3, config=config)
    graph = Graph(ModelFolder.open(export_model(source, tmp_path / "m", route="optimum", patch=patch)), device="cpu")
    assert np.abs(_in_chunks(graph, graph.base, [64]) - _torch_logits(model, IDS)).max() < 1e-4
    with patched(model, patch):
        wanted = _torch_logits(model, IDS)
    assert np.abs(_in_chunks(graph, graph.default, [64]) - wanted).max() < 2e-4


def test_optimum_loads_the_folder_and_generates_the_same_tokens(model: Any, case: tuple[Any, Path]) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    loaded = ORTModelForCausalLM.from_pretrained(case[1])
    ids = torch.tensor([IDS])
    logits = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
    assert np.abs(logits - _torch_logits(model, IDS)).max() < 1e-4
    options = {"max_new_tokens": 12, "do_sample": False}
    got = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert got.tolist() == model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()


def test_auto_falls_back_to_optimum_with_a_warning(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: Any) -> None:
        try:
            raise NotImplementedError("no such operator\nand a page of advice")
        except NotImplementedError as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setattr(model_export, "trace", refuse)
    folder = export_model(open_source(tiny_llama), tmp_path / "m")
    assert ModelFolder.open(folder).route == "optimum"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith("falling back to optimum: NotImplementedError: no such operator")
    with pytest.raises(ModelFormatError, match="no such operator"):
        export_model(open_source(tiny_llama), tmp_path / "n", route="fused")
    assert not (tmp_path / "n").exists()


def test_auto_uses_the_fused_route_if_it_works(tiny_llama_export: Path) -> None:
    assert ModelFolder.open(tiny_llama_export).route == "fused"


def test_a_model_with_its_own_attention_code_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not use transformers' attention interface would otherwise lose its cache."""
    model = load_model(open_source(tiny_llama))
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ModelFormatError, match="attention interface; got 2 calls; wanted 3"):
        model_export._trace(model, slots_of(model, "output"), "fused", "fp32")


def test_a_model_that_no_route_can_export_raises_an_error_of_this_project(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise RuntimeError("aten::strange is not supported\nand a page of advice")

    monkeypatch.setattr(onnx_optimum, "export_pytorch", refuse)
    model = load_model(open_source(tiny_llama))
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(
        ModelFormatError, match="optimum cannot export the model: RuntimeError: aten::strange is not supported;"
    ):
        model_export._trace(model, slots_of(model, "output"), "optimum", "fp32")
    assert {name: id(module) for name, module in model.named_modules()} == modules


def test_an_unknown_architecture_or_route_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(open_source(tiny_llama))
    model.config.model_type = "strange"
    with pytest.raises(ModelFormatError, match="strange"):
        trace(model, [])
    with pytest.raises(ModelFormatError, match="scenic"):
        export_model(open_source(tiny_llama), tmp_path / "m", route="scenic")


def test_every_slot_set_has_an_input_for_each_part(tiny_llama: Path) -> None:
    model = load_model(open_source(tiny_llama))
    for slot_set in SLOT_SETS:
        slots = slots_of(model, slot_set)
        names = [value.name for value in trace(model, slots).graph.inputs]
        assert [name for name in names if name.startswith("tp.")] == [
            f"{slot.name}.{part}" for slot in slots for part in ("a", "b", "bias")
        ]

"""A graph whose inputs, outputs or slots are not those of patch_slots.json is refused when it is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime_tests.committed import FIXTURES
from runtime_tests.folders import alter
from runtime_tests.patches import patch_for
from tp_runtime.errors import ModelFormatError
from tp_runtime.session import KV, Graph, ModelFolder, Slot
from tp_runtime.session.interface import check_interface

FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if (path / "patch_slots.json").exists())


@pytest.fixture(scope="module")
def graph(tiny_llama_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_llama_export), "cpu")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_graph_of_every_route_and_precision_fits_its_description(name: str) -> None:
    folder = ModelFolder.open(FIXTURES / name)
    check_interface(Graph(folder, "cpu").session, folder)


def test_a_graph_with_other_defaults_still_fits(graph: Graph) -> None:
    check_interface(Graph(graph.folder, "cpu", defaults=patch_for(graph.folder)).session, graph.folder)


DESCRIPTIONS: dict[str, tuple[Callable[[ModelFolder], dict[str, Any]], str]] = {
    "a layer more": (lambda folder: {"layers": 4}, "no input past_key_values.3.key"),
    "a layer less": (lambda folder: {"layers": 2}, "an unknown input 'past_key_values.2.key'"),
    "a layer without slot": (lambda folder: {"slots": _without(folder)}, "an unknown input with a default 'tp.2."),
    "another vocabulary": (lambda folder: {"vocab_size": 321}, r"output logits is .* 320\] and not .* 321\]"),
    "another head size": (lambda folder: {"kv": replace(folder.kv, head_dim=8)}, "input past_key_values.0.key is"),
    "another number of heads": (lambda folder: {"kv": replace(folder.kv, heads=1)}, "input past_key_values.0.key is"),
    "float16": (lambda folder: {"kv": KV(2, 16, "f16")}, r"is tensor\(float\) .* and not tensor\(float16\)"),
    "a slot more": (lambda folder: {"slots": _with(folder, Slot(0, "down", 80, 64))}, "no input with a default tp.0.d"),
    "a wider slot": (lambda folder: {"slots": _with(folder, Slot(0, "mlp_out", 81, 64))}, "tp.0.mlp_out.a is"),
    "a slot of more outputs": (lambda folder: {"slots": _with(folder, Slot(0, "mlp_out", 80, 65))}, "mlp_out.b is"),
}


def _without(folder: ModelFolder) -> dict[Any, Slot]:
    return {key: slot for key, slot in folder.slots.items() if key != (2, "mlp_out")}


def _with(folder: ModelFolder, slot: Slot) -> dict[Any, Slot]:
    return {**folder.slots, (slot.layer, slot.site): slot}


@pytest.mark.parametrize(("change", "difference"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_description_that_contradicts_the_graph_is_refused(
    graph: Graph, change: Callable[[ModelFolder], dict[str, Any]], difference: str
) -> None:
    with pytest.raises(ModelFormatError, match=difference) as caught:
        Graph(replace(graph.folder, **change(graph.folder)), "cpu")
    assert caught.value.field == "model.onnx" and "patch_slots.json" in caught.value.problem


def test_a_contradiction_in_the_file_is_refused(tiny_llama_export: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama_export, tmp_path / "m")
    alter(path, lambda data: data.update(vocab_size=1000))
    with pytest.raises(ModelFormatError, match="output logits"):
        Graph(ModelFolder.open(path), "cpu")


# -- graphs ----------------------------------------------------------------------------------------------------


class Interface:
    """The inputs and outputs of a session, with some values taken out, added or replaced by name."""

    def __init__(self, session: Any, changes: dict[str, Any]) -> None:
        self._session, self._changes = session, changes

    def _changed(self, place: str, values: list[Any]) -> list[Any]:
        kept = [self._changes.get(value.name, value) for value in values]
        return [value for value in [*kept, self._changes.get(f"add {place}")] if value is not None]

    def get_inputs(self) -> list[Any]:
        return self._changed("input", self._session.get_inputs())

    def get_outputs(self) -> list[Any]:
        return self._changed("output", self._session.get_outputs())

    def get_overridable_initializers(self) -> list[Any]:
        return self._changed("default", self._session.get_overridable_initializers())


def value(name: str, shape: list[Any] | None, kind: str = "tensor(float)") -> Any:
    return SimpleNamespace(name=name, shape=shape, type=kind)


GRAPHS: dict[str, tuple[dict[str, Any], str]] = {
    "no logits": ({"logits": None}, "no output logits"),
    "no positions": ({"position_ids": None}, "no input position_ids"),
    "no first logit": ({"tp.first_logit": None}, "no input with a default tp.first_logit"),
    "no past": ({"past_key_values.1.value": None}, "no input past_key_values.1.value"),
    "no present": ({"present.2.key": None}, "no output present.2.key"),
    "no bias": ({"tp.1.mlp_out.bias": None}, "no input with a default tp.1.mlp_out.bias"),
    "a slot without default": (
        {"tp.1.mlp_out.a": None, "add input": value("tp.1.mlp_out.a", ["r", 80, "k"])},
        "an unknown input 'tp.1.mlp_out.a'",
    ),
    "an input more": ({"add input": value("token_type_ids", ["b", "s"], "tensor(int64)")}, "unknown input 'token_ty"),
    "an output more": ({"add output": value("hidden\x1b", ["b"])}, r"unknown output 'hidden\\x1b'"),
    "integers of 32 bits": (
        {"input_ids": value("input_ids", ["b", "s"], "tensor(int32)")},
        r"input_ids is tensor.int",
    ),
    "a fixed past": (
        {"past_key_values.0.key": value("past_key_values.0.key", ["b", 2, 7, 16])},
        r"past_key_values.0.key is tensor\(float\) \[\?, 2, 7, 16\]",
    ),
    "a rank that is fixed": ({"tp.0.mlp_out.a": value("tp.0.mlp_out.a", [1, 80, 0])}, "tp.0.mlp_out.a is"),
    "logits of two dimensions": ({"logits": value("logits", ["b", 320])}, "output logits is"),
    "logits without a shape": ({"logits": value("logits", None)}, "output logits is"),
}


@pytest.mark.parametrize(("changes", "difference"), GRAPHS.values(), ids=GRAPHS)
def test_a_graph_that_contradicts_its_description_is_refused(
    graph: Graph, changes: dict[str, Any], difference: str
) -> None:
    with pytest.raises(ModelFormatError, match=difference):
        check_interface(Interface(graph.session, changes), graph.folder)


def test_a_free_vocabulary_and_logits_of_half_precision_are_accepted(graph: Graph) -> None:
    logits = value("logits", ["b", "s", None], "tensor(float16)")
    check_interface(Interface(graph.session, {"logits": logits}), graph.folder)


def test_many_differences_are_counted(graph: Graph) -> None:
    with pytest.raises(ModelFormatError, match="and 9 more"):
        Graph(replace(graph.folder, layers=6), "cpu")

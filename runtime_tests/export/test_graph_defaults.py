"""`tp-export check` compares the default values of a graph's slots with the patch that the folder states."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime_tests.committed import FIXTURES
from runtime_tests.folders import alter
from runtime_tests.patches import patch_for
from tp_export import cli
from tp_export.graph_check import check_description, check_graph
from tp_runtime.errors import ModelFormatError
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE, WINDOWED_SHIFT, WINDOWED_TOTAL, ModelFolder

BIAS = "tp.2.mlp_out.bias"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURES / "tiny-llama-patched", tmp_path / "m")


def list_again(folder: Path) -> None:
    """Let the description list the files as they are now."""

    def change(data: dict[str, Any]) -> None:
        for name in data["files"]:
            raw = (folder / name).read_bytes()
            data["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}

    alter(folder, change)


def change_graph(folder: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / "model.onnx")
    list_again(folder)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("name", sorted(folder.name for folder in FIXTURES.glob("tiny-*")))
def test_an_exported_folder_has_the_defaults_that_it_states(name: str) -> None:
    default = ModelFolder.open(FIXTURES / name).default_patch
    stated = "the base" if default is None else f"the patch {default.name!r}, identity {default.identity[:16]}"
    assert f"defaults: {stated}" in check_graph(FIXTURES / name)


def test_a_forged_default_identity_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file and the description agree, and the graph holds another patch."""
    other = patch_for(ModelFolder.open(copy), seed=9)
    other.save(copy / DEFAULT_FILE, "f32")
    terms = [[other.identity, 1.0]]
    alter(copy, lambda data: data["default_patch"].update(identity=other.identity, terms=terms))
    list_again(copy)
    assert cli.main(["check", str(copy)]) == 2
    assert "the graph's default values are not those of the folder's default patch" in capsys.readouterr().err


def test_a_description_that_contradicts_the_file_is_found(copy: Path) -> None:
    alter(copy, lambda data: data["default_patch"].update(identity="a" * 64, terms=[["a" * 64, 1.0]]))
    with pytest.raises(ModelFormatError, match="does not hold the folder's default patch"):
        check_graph(copy)


def test_a_patched_graph_that_claims_to_be_the_base_is_found(copy: Path) -> None:
    alter(copy, lambda data: data.update(default_patch=None))
    with pytest.raises(ModelFormatError, match=r"default values.*wanted the base"):
        check_graph(copy)


def test_one_changed_value_of_the_patchs_data_file_is_found(copy: Path) -> None:
    file = copy / "patch.onnx_data"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    list_again(copy)
    with pytest.raises(ModelFormatError, match="default values are not those"):
        check_graph(copy)


def test_a_shape_that_differs_is_found_although_the_values_are_equal(copy: Path) -> None:
    patch = Patch.load(copy / DEFAULT_FILE)
    values = patch.deltas[2, "mlp_out"].bias
    assert values is not None

    def change(model: onnx.ModelProto) -> None:
        initializer(model, BIAS).CopyFrom(numpy_helper.from_array(values[None], BIAS))

    change_graph(copy, change)
    with pytest.raises(ModelFormatError, match=r"tp\.2\.mlp_out\.bias.*\[1, 64\]"):
        check_graph(copy)


def test_a_slot_that_the_session_cannot_override_is_found(copy: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input.remove(next(value for value in model.graph.input if value.name == BIAS))

    change_graph(copy, change)
    with pytest.raises(ModelFormatError, match="an initializer that is no input"):
        check_graph(copy)


def test_a_slot_without_values_is_found(copy: Path) -> None:
    change_graph(copy, lambda model: model.graph.initializer.remove(initializer(model, BIAS)))
    with pytest.raises(ModelFormatError, match="no initializer"):
        check_graph(copy)


def test_a_slot_of_another_dtype_is_found(copy: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        initializer(model, BIAS).CopyFrom(numpy_helper.from_array(np.zeros((1, 1, 64), np.float16), BIAS))

    change_graph(copy, change)
    with pytest.raises(ModelFormatError, match="float16"):
        check_graph(copy)


# -- windowed layers -------------------------------------------------------------------------------------------


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURES / "tiny-gemma", tmp_path / "m")


@pytest.mark.parametrize("name", [WINDOWED_SHIFT, WINDOWED_TOTAL])
def test_a_cache_length_of_windowed_layers_that_is_not_the_default_is_found(gemma: Path, name: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        initializer(model, name).CopyFrom(numpy_helper.from_array(np.array([-1], np.int32), name))

    change_graph(gemma, change)
    with pytest.raises(
        ModelFormatError, match=rf"{name}: the graph gives windowed layers another cache length.*\[-1\]"
    ):
        check_graph(gemma)


def test_a_cache_length_of_windowed_layers_without_a_default_is_found(gemma: Path) -> None:
    change_graph(gemma, lambda model: model.graph.initializer.remove(initializer(model, WINDOWED_SHIFT)))
    with pytest.raises(ModelFormatError, match="got no default"):
        check_graph(gemma)


@pytest.mark.parametrize(
    ("windowed", "field"),
    [
        ({"layers": [0], "window": 8}, "2.key"),
        ({"layers": [0, 2], "window": 9}, "0.key"),
        ({"layers": [0, 1], "window": 8}, "1.key"),
    ],
    ids=["a layer less", "another window", "another layer"],
)
def test_windowed_layers_that_are_not_those_of_the_graph_are_found(gemma: Path, windowed: Any, field: str) -> None:
    check_description(gemma)
    alter(gemma, lambda data: data.update(windowed=windowed))
    with pytest.raises(ModelFormatError, match=rf"past_key_values\.{field}: the graph's windowed layers are not those"):
        check_description(gemma)


def test_a_windowed_layer_that_reads_the_length_of_full_layers_is_found(gemma: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
        attention[0].input[5] = attention[1].input[5]

    change_graph(gemma, change)
    with pytest.raises(ModelFormatError, match=r"past_key_values\.0\.key.*a length that is not its own"):
        check_description(gemma)

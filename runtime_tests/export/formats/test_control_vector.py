"""GGUF control vectors: written and read by the rules of repeng and llama.cpp, and every loss is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import random_config
from tp_export import cli
from tp_export.formats import read_control_vector
from tp_export.source import load_model, open_source
from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchTargetError
from tp_runtime.patch import Delta, Patch

SIZE = 64  # the hidden size of tiny_llama, which has 3 layers
VALUES = np.ones(SIZE, np.float32)


def bias_patch(source: Path, layers: range = range(1, 3), pair: bool = False) -> Patch:
    opened = open_source(source)
    rng = np.random.default_rng(0)
    size = opened.config["hidden_size"]
    deltas = {}
    for layer in layers:
        bias = rng.standard_normal(size)
        a, b = (np.ones((80, 1)), np.ones((1, size))) if pair else (None, None)
        deltas[layer, "mlp_out"] = Delta(a, b, bias)
    config = random_config(base_digest=opened.digest, base_model=opened.name, architecture=opened.architecture)
    return Patch(deltas, config)


def written(path: Path, directions: dict[str, np.ndarray], architecture: str = "controlvector", **fields: Any) -> Path:
    """Write a file in the format of repeng's export_gguf."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for key, value in ({"layer_count": len(directions)} | fields).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(f"controlvector.{key}", value)
    for name, values in directions.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma"])
def test_an_exported_and_imported_patch_is_the_same_patch(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(model)
    patch = bias_patch(source)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    assert cli.main(["control-vector", str(tmp_path / "p.safetensors"), str(tmp_path / "v.gguf")]) == 0
    arguments = ["import", str(tmp_path / "v.gguf"), str(tmp_path / "q.safetensors"), "--base", str(source)]
    assert cli.main(arguments) == 0
    back = Patch.load(tmp_path / "q.safetensors")
    assert back.identity == patch.identity
    assert (back.config.method, back.name) == ("imported", "v") and back.config.probe is not None


def test_the_file_has_the_format_that_llama_cpp_and_repeng_read(tiny_llama: Path, tmp_path: Path) -> None:
    """llama.cpp's common_control_vector_load_one needs float32, one dimension, and direction.<n> with n >= 1.

    repeng needs the model hint and the layer count.
    """
    patch = bias_patch(tiny_llama)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    cli.main(["control-vector", str(tmp_path / "p.safetensors"), str(tmp_path / "v.gguf")])
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.2"}
    for layer in (1, 2):
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, patch.deltas[layer, "mlp_out"].bias)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma"])
def test_direction_n_is_added_to_the_output_of_block_n(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """repeng's ControlModule and llama.cpp's build_cvec add it to block n, counted from 0."""
    source = open_source(request.getfixturevalue(model))
    direction = np.random.default_rng(1).standard_normal(source.config["hidden_size"]).astype(np.float32)
    file = written(tmp_path / "v.gguf", {"direction.1": direction})
    torch_model, ids = load_model(source), token_ids(30)
    patch = Patch(read_control_vector(file, source.config), random_config())
    got = torch_logits(torch_model, ids, patch)

    def add(_module: Any, _args: Any, out: Any) -> Any:
        return (out[0] + add.direction, *out[1:]) if isinstance(out, tuple) else out + add.direction  # type: ignore[attr-defined]

    import torch

    add.direction = torch.from_numpy(direction)  # type: ignore[attr-defined]
    torch_model.model.layers[1].register_forward_hook(add)
    assert furthest(got, torch_logits(torch_model, ids)) < 1e-4


def test_block_0_and_half_precision_of_repeng_are_accepted(tiny_llama: Path, tmp_path: Path) -> None:
    values = np.arange(SIZE, dtype=np.float16)
    file = written(tmp_path / "v.gguf", {"direction.0": values, "direction.2": values})
    deltas = read_control_vector(file, open_source(tiny_llama).config)
    assert set(deltas) == {(0, "mlp_out"), (2, "mlp_out")}
    assert np.array_equal(deltas[0, "mlp_out"].bias, values)


@pytest.mark.parametrize("count", [1, 3, 2, None], ids=["directions", "blocks of the model", "up to the last", "none"])
def test_a_layer_count_may_count_what_writers_count(
    count: int | None, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp and repeng ignore the count; tools write the directions, the model's blocks, or the last block."""
    file = written(tmp_path / "v.gguf", {"direction.2": VALUES}, layer_count=count)
    deltas = read_control_vector(file, open_source(tiny_llama).config)
    assert set(deltas) == {(2, "mlp_out")} and np.array_equal(deltas[2, "mlp_out"].bias, VALUES)
    out = tmp_path / "p.safetensors"
    if count == 3:
        assert cli.main(["import", str(file), str(out), "--base", str(tiny_llama)]) == 0
        assert "note: the file has no direction for block 1\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layers", "pair", "named"),
    [(range(3), False, "the bias of layers.0.mlp_out"), (range(1, 3), True, "the pair of layers.1.mlp_out")],
)
def test_deltas_that_a_control_vector_cannot_represent_are_refused_or_reported(
    layers: range, pair: bool, named: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = bias_patch(tiny_llama, layers, pair)
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    arguments = ["control-vector", str(tmp_path / "p.safetensors"), str(tmp_path / "v.gguf")]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert named in message and "--lossy" in message and not (tmp_path / "v.gguf").exists()
    assert cli.main([*arguments, "--lossy"]) == 0
    assert f"left out: {named}" in capsys.readouterr().err
    deltas = read_control_vector(tmp_path / "v.gguf", open_source(tiny_llama).config)
    assert {layer for layer, _ in deltas} == {1, 2}


def test_a_patch_without_representable_biases_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bias_patch(tiny_llama, range(1)).save(tmp_path / "p.safetensors")
    arguments = ["control-vector", str(tmp_path / "p.safetensors"), str(tmp_path / "v.gguf"), "--lossy"]
    assert cli.main(arguments) == 2
    assert "the patch has nothing that a control vector can represent" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize(
    ("directions", "options", "error", "named"),
    [
        ({"direction.1": VALUES}, {"architecture": "llama"}, PatchFormatError, "general.architecture"),
        ({"direction.1": VALUES}, {"layer_count": 2}, PatchFormatError, "directions are missing from the file"),
        ({"direction.1": VALUES}, {"layer_count": 4}, PatchFormatError, "directions are missing from the file"),
        ({"direction.1": VALUES}, {"layer_count": 0}, PatchFormatError, "layer_count 0"),
        ({"direction.1": VALUES}, {"layer_count": "3"}, PatchFormatError, "layer_count '3'"),
        ({"direction.1": VALUES}, {"layer_count": [3, 3]}, PatchFormatError, r"layer_count \[3, 3\]"),
        ({"direction.1": VALUES}, {"layer_count": 3.0}, PatchFormatError, r"layer_count 3\.0"),
        ({"direction.1": VALUES}, {"layer_count": True}, PatchFormatError, "layer_count True"),
        ({"direction.1": VALUES, "direction.01": VALUES}, {}, PatchTargetError, r"direction\.01"),
        ({f"direction.{'9' * 50}": VALUES}, {}, PatchTargetError, "direction.999"),
        ({"direction.99999": VALUES}, {}, PatchShapeError, "layer 99999"),
        ({}, {}, PatchFormatError, "directions are missing from the file"),
        ({"direction.1": VALUES.astype(np.float64)}, {}, PatchFormatError, "F64"),
        ({"direction.x": VALUES}, {}, PatchTargetError, "direction.x"),
        ({"direction.-1": VALUES}, {}, PatchTargetError, "direction.-1"),
        ({"steer.1": VALUES}, {}, PatchTargetError, "steer.1"),
        ({"direction.3": VALUES}, {}, PatchShapeError, "layers 0..2"),
        ({"direction.1": VALUES[1:]}, {}, PatchShapeError, "63"),
        ({"direction.1": VALUES[None]}, {}, PatchShapeError, "direction.1"),
    ],
)
def test_files_that_are_not_a_control_vector_of_the_base_are_refused(
    directions: Any, options: Any, error: type[Exception], named: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = written(tmp_path / "v.gguf", directions, **options)
    with pytest.raises(error, match=named):
        read_control_vector(file, open_source(tiny_llama).config)


def test_damaged_files_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    whole = written(tmp_path / "v.gguf", {"direction.1": VALUES, "direction.2": VALUES}).read_bytes()
    config = open_source(tiny_llama).config
    file = tmp_path / "damaged.gguf"
    with pytest.raises(PatchFormatError):
        read_control_vector(file, config)
    for content in (b"", b"GGUF", b"PK\x03\x04" + whole, *(whole[:end] for end in range(8, len(whole), 37))):
        file.write_bytes(content)
        with pytest.raises(PatchFormatError):
            read_control_vector(file, config)

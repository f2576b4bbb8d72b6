"""A patch as files for llama.cpp: names, shapes and scale of its LoRA, its biases in a control vector, its losses."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from runtime_tests.patches import random_config
from tp_export import cli
from tp_export.formats import read_control_vector
from tp_export.source import open_source
from tp_runtime.patch import Delta, Patch


def saved(source: Path, out: Path, deltas: dict[tuple[int, str], Delta]) -> Patch:
    opened = open_source(source)
    config = random_config(base_digest=opened.digest, base_model=opened.name, architecture=opened.architecture)
    patch = Patch(deltas, config)
    patch.save(out, dtype="f32")
    return patch


def pair(inputs: int, outputs: int, rank: int, bias: bool = True) -> Delta:
    rng = np.random.default_rng(rank)
    values = rng.standard_normal(outputs) if bias else None
    return Delta(rng.standard_normal((inputs, rank)), rng.standard_normal((rank, outputs)), values)


def lora(source: Path, file: Path, out: Path, *options: str) -> int:
    return cli.main(["lora", str(file), str(out), "--base", str(source), "--gguf", *options])


def test_the_lora_has_the_format_that_llama_cpp_reads(tiny_llama: Path, tmp_path: Path) -> None:
    """llama_adapter_lora_init reads a [rank, in] and b [out, rank] by the base's tensor names; alpha / rank is 1."""
    deltas = {
        (0, "gate"): pair(64, 80, 2, bias=False),
        (1, "mlp_out"): pair(80, 64, 3),
        (2, "mlp_out"): pair(80, 64, 1),
    }
    patch = saved(tiny_llama, tmp_path / "p.safetensors", deltas)
    assert lora(tiny_llama, tmp_path / "p.safetensors", tmp_path / "out") == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "lora.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 3.0
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {(0, "gate"): "blk.0.ffn_gate", (1, "mlp_out"): "blk.1.ffn_down", (2, "mlp_out"): "blk.2.ffn_down"}
    assert set(tensors) == {f"{name}.weight.lora_{part}" for name in names.values() for part in "ab"}
    for slot, name in names.items():
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        assert a.shape[0] == b.shape[1] == 3  # all pairs have one rank, so alpha / rank is 1 for each
        delta = patch.deltas[slot]
        assert np.allclose(b @ a, (delta.a @ delta.b).T, atol=1e-5)  # type: ignore[operator]
    vector = read_control_vector(tmp_path / "out" / "control-vector.gguf", open_source(tiny_llama).config)
    assert {slot: delta.bias.tolist() for slot, delta in vector.items()} == {  # type: ignore[union-attr]
        slot: patch.deltas[slot].bias.tolist()  # type: ignore[union-attr]
        for slot in ((1, "mlp_out"), (2, "mlp_out"))
    }


def test_the_bias_of_down_is_exported_if_no_norm_follows(tiny_llama: Path, tmp_path: Path) -> None:
    patch = saved(tiny_llama, tmp_path / "p.safetensors", {(1, "down"): pair(80, 64, 2)})
    assert lora(tiny_llama, tmp_path / "p.safetensors", tmp_path / "out") == 0
    vector = read_control_vector(tmp_path / "out" / "control-vector.gguf", open_source(tiny_llama).config)
    assert np.array_equal(vector[1, "mlp_out"].bias, patch.deltas[1, "down"].bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "slot", "sizes"),
    [
        ("tiny_llama", (0, "mlp_out"), (80, 64)),
        ("tiny_llama", (1, "up"), (64, 80)),
        ("tiny_gemma", (1, "down"), (80, 48)),
    ],
)
def test_biases_that_llama_cpp_cannot_represent_are_refused_or_reported(
    model: str,
    slot: tuple[int, str],
    sizes: tuple[int, int],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source: Path = request.getfixturevalue(model)
    saved(source, tmp_path / "p.safetensors", {slot: pair(*sizes, 2)})
    assert lora(source, tmp_path / "p.safetensors", tmp_path / "out") == 2
    named = f"the bias of layers.{slot[0]}.{slot[1]}"
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert lora(source, tmp_path / "p.safetensors", tmp_path / "out", "--lossy") == 0
    assert f"left out: {named}" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["lora.gguf"]


@pytest.mark.parametrize(
    ("delta", "slot", "named"),
    [(pair(64, 64, 2, bias=False), (1, "o"), "attn_output"), (Delta(bias=np.ones(64)), (1, "mlp_out"), "only biases")],
)
def test_patches_that_need_the_converter_or_a_control_vector_are_refused(
    delta: Delta,
    slot: tuple[int, str],
    named: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved(tiny_llama, tmp_path / "p.safetensors", {slot: delta})
    assert lora(tiny_llama, tmp_path / "p.safetensors", tmp_path / "out") == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_gemma_has_the_architecture_name_of_llama_cpp(tiny_gemma: Path, tmp_path: Path) -> None:
    saved(tiny_gemma, tmp_path / "p.safetensors", {(1, "down"): pair(80, 48, 2, bias=False)})
    assert lora(tiny_gemma, tmp_path / "p.safetensors", tmp_path / "out") == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "lora.gguf")
    assert reader.get_field("general.architecture").contents() == "gemma3"  # type: ignore[union-attr]
    assert {tensor.name for tensor in reader.tensors} == {f"blk.1.ffn_down.weight.lora_{part}" for part in "ab"}

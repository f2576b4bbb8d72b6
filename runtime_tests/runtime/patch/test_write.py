"""Writing patch files: a file is written completely or not at all, and only with values that fit its dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from runtime_tests.patches import random_config, random_patch
from tp_runtime.errors import OutputError, PatchFormatError, PatchValueError
from tp_runtime.patch import Delta, Patch
from tp_runtime.patch import container as patch_container


def bias_patch(*values: float) -> Patch:
    return Patch({(0, "mlp_out"): Delta(bias=np.array(values, np.float32))}, random_config())


def test_the_safetensors_library_reads_a_written_patch(tmp_path):
    patch = random_patch(sites=("gate", "mlp_out"))
    patch.save(tmp_path / "p.safetensors", dtype="f32")
    with safetensors.safe_open(tmp_path / "p.safetensors", "numpy") as opened:
        assert opened.metadata() | {"config": ""} == {"format": "tp-patch", "version": "1", "config": ""}
        assert len(opened.keys()) == 16
        np.testing.assert_array_equal(opened.get_tensor("layers.1.gate.a"), patch.deltas[1, "gate"].a)


def test_tensors_are_aligned_and_equal_patches_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        random_patch().save(tmp_path / f"{name}.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == (tmp_path / "b.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_bf16_rounds_to_nearest_even(tmp_path):
    step = 2.0**-7  # the step of bf16 between 1 and 2
    ties = {1 + step / 2: 1.0, 1 + 3 * step / 2: 1 + 2 * step, 1 + step * 0.51: 1 + step, -1 - step / 2: -1.0}
    ties |= {3e38: float(np.float32(2.9972e38)), 0.0: 0.0, 1e-40: None, 2 - step / 4: 2.0}
    bias_patch(*ties).save(tmp_path / "p.safetensors", dtype="bf16")
    loaded = Patch.load(tmp_path / "p.safetensors").deltas[0, "mlp_out"].bias
    for got, (given_value, wanted) in zip(loaded, ties.items(), strict=True):
        if wanted is None or abs(wanted) > 1e38:
            assert abs(got - given_value) <= max(abs(given_value) * 2.0**-8, 1e-40)
        else:
            assert got == wanted


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("f16", -1e30), ("bf16", 3.4e38)])
def test_a_value_that_does_not_fit_the_dtype_is_refused(tmp_path, dtype, value):
    with pytest.raises(PatchValueError, match=rf"layers\.0\.mlp_out\.bias: a value does not fit {dtype}.*'f32'"):
        bias_patch(1.0, value).save(tmp_path / "p.safetensors", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_f16_value_fits(tmp_path):
    bias_patch(65504.0).save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").deltas[0, "mlp_out"].bias[0] == 65504.0


@pytest.mark.parametrize("dtype", ["f64", "float16", 16])
def test_saving_with_an_unknown_dtype_is_refused(tmp_path, dtype):
    with pytest.raises(PatchFormatError, match=r"the dtype is unknown.*wanted f16 \| bf16 \| f32 \| i8"):
        bias_patch(1.0).save(tmp_path / "p.safetensors", dtype=dtype)


@pytest.mark.parametrize("name", ["p.pt", "p.bin", "p"])
def test_saving_with_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(PatchFormatError, match=rf"save as {name}\.safetensors"):
        bias_patch(1.0).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cap", ["MAX_HEADER_BYTES", "MAX_FILE_BYTES"])
def test_saving_a_file_over_the_readers_size_limit_is_refused(tmp_path, monkeypatch, cap):
    monkeypatch.setattr(patch_container, cap, 100)
    with pytest.raises(PatchFormatError, match="the patch is too large"):
        random_patch().save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    bias_patch(1.0).save(path)
    old = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bias_patch(2.0).save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_saving_on_a_full_disk_raises_the_systems_error(tmp_path, monkeypatch):
    real = Path.open

    def onto_full_disk(path, mode="r", *rest):
        return real(Path("/dev/full") if mode == "wb" else path, mode, *rest)

    monkeypatch.setattr(Path, "open", onto_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        bias_patch(1.0).save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_patch_package_needs_neither_torch_nor_onnxruntime():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'transformers']));"
        "import tp_runtime.patch, tp_runtime.storage"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_is_no_patch_is_not_replaced(tmp_path: Path) -> None:
    patch = random_patch()
    other = save({"weight": np.zeros(4, np.float32)})
    for content in (other, b"notes", bytes(8), other[:12]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(OutputError, match="is not replaced"):
            patch.save(tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").read_bytes() == content


def test_a_truncated_patch_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    random_patch().save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    random_patch().save(file)
    assert file.read_bytes() == whole

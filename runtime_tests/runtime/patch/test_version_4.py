"""Version 4 of the file: entries of four bits with scales and zero points; what it stores, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from runtime_tests.bad_patches import changed, packed, refused, unpacked
from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchValueError
from tp_runtime.patch import Delta, KVPrefix, Patch, entry_nbytes, entry_tensors, round_to_int4, round_to_int8
from tp_runtime.patch.dtypes import DTYPES

A, BIAS = "layers.0.mlp_out.a", "layers.0.mlp_out.bias"
KEY, KEY_SCALE, KEY_ZERO = (f"prefix.0.key{suffix}" for suffix in ("", "_scale", "_zero"))
VALUE, VALUE_ZERO = "prefix.0.value", "prefix.0.value_zero"


def whole(**shape: int) -> Patch:
    """Return a patch with weights and entries."""
    return Patch(random_patch().deltas, random_config(), KVPrefix(arrays(**shape), (1, 2), 100))


def saved(path: Path, patch: Patch | None = None, dtype: str | None = "i4") -> bytes:
    (patch or whole()).save(path / "p.safetensors", dtype)
    return (path / "p.safetensors").read_bytes()


# -- what is stored ------------------------------------------------------------------------------------------


def test_entries_have_four_bits_factors_are_int8_and_the_rest_is_half_precision(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    assert metadata["version"] == "4" and metadata["config"]["stop"] == []
    assert metadata["config"]["prefix"]["counts"] == [3, 3]
    assert {name: (dtype, shape) for name, (dtype, shape, _) in parts.items() if ".0." in name} == {
        "layers.0.mlp_out.a": ("I8", [12, 4]),
        "layers.0.mlp_out.a_scale": ("F16", [4]),
        "layers.0.mlp_out.b": ("I8", [4, 8]),
        "layers.0.mlp_out.b_scale": ("F16", [4]),
        "layers.0.mlp_out.bias": ("F16", [8]),
        "layers.0.mlp_out.mean": ("F16", [12]),
        "prefix.0.key": ("U8", [3, 2, 2]),
        "prefix.0.key_scale": ("F16", [1, 2, 4]),
        "prefix.0.key_zero": ("I8", [1, 2, 4]),
        "prefix.0.value": ("U8", [3, 2, 2]),
        "prefix.0.value_scale": ("F16", [3, 2, 1]),
        "prefix.0.value_zero": ("I8", [3, 2, 1]),
    }


def test_a_loaded_patch_has_the_rounded_values_and_their_identity(tmp_path: Path) -> None:
    patch = whole(entries=70, head_dim=6)
    saved(tmp_path, patch)
    loaded, rounded = Patch.load(tmp_path / "p.safetensors"), patch.rounded("i4")
    assert loaded.identity == rounded.identity != patch.identity
    assert loaded.dtype == rounded.dtype == "i4"
    assert loaded.prefix is not None and patch.prefix is not None
    for entry, values in patch.prefix.entries.items():
        np.testing.assert_array_equal(loaded.prefix.entries[entry], round_to_int4(entry[1], values))
        out = np.empty(values.shape, np.float16)
        loaded.prefix.tensors[entry].write(out)
        np.testing.assert_array_equal(out, round_to_int4(entry[1], values).astype(np.float16))
    (slot,) = [slot for slot in patch.deltas if slot[0] == 0][:1]
    np.testing.assert_array_equal(loaded.deltas[slot].a, round_to_int8("a", patch.deltas[slot].a))  # type: ignore[arg-type]


def test_a_loaded_patch_is_saved_again_with_equal_bytes(tmp_path: Path) -> None:
    content = saved(tmp_path)
    assert saved(tmp_path, Patch.load(tmp_path / "p.safetensors"), None) == content
    assert saved(tmp_path, whole().rounded("i4"), None) == content


def test_a_patch_of_weights_alone_is_that_of_int8(tmp_path: Path) -> None:
    assert saved(tmp_path, random_patch()) == saved(tmp_path, random_patch(), "i8")
    assert Patch.load(tmp_path / "p.safetensors").dtype == random_patch().rounded("i4").dtype == "i8"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_patch_has_the_dtype_that_a_loaded_one_has(tmp_path: Path, dtype: str) -> None:
    bias = {slot: Delta(bias=delta.bias) for slot, delta in random_patch().deltas.items()}
    vector = Patch(bias, random_config(method="vector"))
    for patch in (whole(), random_patch(), vector):
        saved(tmp_path, patch, dtype)
        loaded, rounded = Patch.load(tmp_path / "p.safetensors"), patch.rounded(dtype)
        assert loaded.dtype == rounded.dtype and loaded.nbytes == rounded.nbytes


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    saved(tmp_path)
    with safetensors.safe_open(tmp_path / "p.safetensors", "numpy") as opened:
        assert opened.get_tensor(KEY).dtype == np.uint8 and opened.get_tensor(KEY_ZERO).dtype == np.int8


def test_a_file_has_little_more_than_half_the_bytes_of_int8_and_keeps_them_in_memory(tmp_path: Path) -> None:
    patch = Patch({}, random_config(method="prefix"), KVPrefix(arrays(192, 2, 3, 64), (1,), 200))
    sizes = {dtype: len(saved(tmp_path, patch, dtype)) for dtype in ("f32", "i8", "i4")}
    assert sizes["i4"] < 0.56 * sizes["i8"] and sizes["i4"] < 0.15 * sizes["f32"]
    for dtype, size in sizes.items():
        saved(tmp_path, patch, dtype)
        loaded = Patch.load(tmp_path / "p.safetensors")
        assert loaded.nbytes == size and loaded.memory_bytes == 2 * entry_nbytes(dtype, 192, 3, 64) < size
        _metadata, parts = unpacked(saved(tmp_path, patch, dtype))
        assert len(parts) == 2 * entry_tensors(dtype)


# -- what is refused -----------------------------------------------------------------------------------------


def test_entries_of_an_odd_head_dim_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchShapeError, match="share bytes in pairs") as error:
        saved(tmp_path, whole(head_dim=3))
    assert (error.value.field, error.value.fix) == (KEY, "save with dtype='i8'")
    assert not list(tmp_path.iterdir())


def test_a_value_too_large_for_four_bits_is_refused(tmp_path: Path) -> None:
    entries = arrays()
    entries[1, "value"][0, 0, 0] = 3e5
    with pytest.raises(PatchValueError, match="a value does not fit four bits") as error:
        saved(tmp_path, Patch({}, random_config(method="prefix"), KVPrefix(entries, (1,), 5)))
    assert error.value.field == "prefix.1.value"


@pytest.mark.parametrize("name", [KEY_SCALE, KEY_ZERO, VALUE_ZERO])
def test_a_tensor_without_what_stands_beside_it_is_refused(tmp_path: Path, name: str) -> None:
    what = "zero points" if name.endswith("zero") else "scales"
    wanted = f"the tensor of four bits has no {what}; got no such tensor; wanted '{name}'"
    refused(tmp_path, changed(saved(tmp_path), name, None), PatchFormatError, wanted)


def test_zero_points_beside_another_tensor_are_refused(tmp_path: Path) -> None:
    content = changed(saved(tmp_path), f"{A}_zero", "I8", [4], bytes(4))
    refused(tmp_path, content, PatchFormatError, f"{A}_zero: there are zero points, but their tensor has not four bits")


@pytest.mark.parametrize(("name", "size"), [(A, 48), (BIAS, 8)])
def test_other_parts_of_four_bits_are_refused(tmp_path: Path, name: str, size: int) -> None:
    content = changed(saved(tmp_path), name, "U8", None, bytes(size))
    refused(tmp_path, content, PatchFormatError, f"{name}: this tensor may not have four bits")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path, value: float) -> None:
    raw = np.array([1.0] * 7 + [value], np.float16).tobytes()
    content = changed(saved(tmp_path), KEY_SCALE, "F16", None, raw)
    refused(tmp_path, content, PatchValueError, f"{KEY_SCALE}: a scale is NaN, infinite, zero or negative")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "problem"),
    [
        (KEY_SCALE, "F16", [2, 4], "the scales do not fit their tensor"),
        (KEY_ZERO, "I8", [2, 2, 4], "the zero points do not fit their tensor"),
        (VALUE_ZERO, "I8", [3, 2], "the zero points do not fit their tensor"),
        (VALUE, "U8", [12], "the tensor of four bits has a wrong shape"),
        (VALUE, "U8", [3, 2, 0], "the tensor of four bits has a wrong shape"),
    ],
)
def test_wrong_shapes_are_refused(tmp_path: Path, name: str, dtype: str, shape: list[int], problem: str) -> None:
    raw = (np.ones(shape, np.float16) if dtype == "F16" else np.ones(shape, np.int8)).tobytes()
    refused(tmp_path, changed(saved(tmp_path), name, dtype, shape, raw), PatchShapeError, f"{name}: {problem}")


def test_zero_points_of_another_dtype_are_refused(tmp_path: Path) -> None:
    content = changed(saved(tmp_path), KEY_ZERO, "F16", None, bytes(16))
    refused(tmp_path, content, PatchFormatError, "the zero points have a wrong dtype; got F16; wanted I8")


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_four_bits_in_an_older_version_are_refused(tmp_path: Path, version: str) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    wanted = f"the version does not fit a file with four bits in '{KEY}'; got '{version}'; wanted '4'"
    refused(tmp_path, packed({**metadata, "version": version}, parts), PatchFormatError, wanted)


def test_a_file_of_version_4_without_its_keys_is_refused(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    for key in ("stop", "prefix"):
        config: dict[str, Any] = dict(metadata["config"])
        if key == "stop":
            del config["stop"]
        else:
            config["prefix"] = {name: value for name, value in config["prefix"].items() if name != "counts"}
        missing = "counts" if key == "prefix" else key
        wanted = f"a file of version 4 lacks the key `{missing}`"
        refused(tmp_path, packed({**metadata, "config": config}, parts), PatchFormatError, wanted)


def test_a_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    content = changed(saved(tmp_path), KEY_SCALE, "F32", None, np.full(8, 3e38, np.float32).tobytes())
    refused(tmp_path, content, PatchValueError, f"{KEY}: the tensor holds NaN or infinity")

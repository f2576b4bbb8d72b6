"""Version 3 of the file: int8 tensors with scales, stop strings and counts; what it stores, and when it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors

from runtime_tests.bad_patches import packed, unpacked
from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.patch import Delta, KVPrefix, Patch, round_to_int8

from .version_3 import A_SCALE, BIAS, SLOT, A, ragged, saved, version, whole

# -- what is stored ------------------------------------------------------------------------------------------


def test_factors_and_entries_are_int8_with_their_scales_and_the_rest_is_half_precision(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    assert metadata["version"] == "3" and metadata["config"]["stop"] == []
    assert metadata["config"]["prefix"] == {"replaces": [1, 2], "position": 5, "counts": [3, 3]}
    shapes = {name: (dtype, shape) for name, (dtype, shape, _) in parts.items() if ".0." in name}
    assert shapes == {
        "layers.0.mlp_out.a": ("I8", [12, 4]),
        "layers.0.mlp_out.a_scale": ("F16", [4]),
        "layers.0.mlp_out.b": ("I8", [4, 8]),
        "layers.0.mlp_out.b_scale": ("F16", [4]),
        "layers.0.mlp_out.bias": ("F16", [8]),
        "layers.0.mlp_out.mean": ("F16", [12]),
        "prefix.0.key": ("I8", [3, 2, 4]),
        "prefix.0.key_scale": ("F16", [2, 4]),
        "prefix.0.value": ("I8", [3, 2, 4]),
        "prefix.0.value_scale": ("F16", [3, 2]),
    }


def test_a_loaded_patch_has_the_rounded_values_and_their_identity(tmp_path: Path) -> None:
    patch = whole()
    saved(tmp_path, patch)
    loaded, rounded = Patch.load(tmp_path / "p.safetensors"), patch.rounded("i8")
    assert loaded.identity == rounded.identity != patch.identity
    assert loaded.config == patch.config and loaded.dtype == rounded.dtype == "i8"
    assert loaded.prefix is not None and patch.prefix is not None
    for entry, values in patch.prefix.entries.items():
        np.testing.assert_array_equal(loaded.prefix.entries[entry], round_to_int8(entry[1], values))
    delta, stored = patch.deltas[SLOT], loaded.deltas[SLOT]
    assert delta.a is not None and delta.bias is not None
    np.testing.assert_array_equal(stored.a, round_to_int8("a", delta.a))
    np.testing.assert_array_equal(stored.bias, delta.bias.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "i8"])
def test_a_loaded_patch_is_saved_again_with_equal_bytes(tmp_path: Path, dtype: str) -> None:
    content = saved(tmp_path, None, dtype)
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.dtype == dtype and saved(tmp_path, loaded, None) == content
    assert saved(tmp_path, whole().rounded(dtype), None) == content


def test_tiny_and_huge_values_are_stored_with_scales_in_float32(tmp_path: Path) -> None:
    tiny, huge = np.full((3, 1), 1e-12, np.float32), np.full((1, 4), 1e30, np.float32)
    patch = Patch({SLOT: Delta(tiny, huge, np.zeros(4, np.float32))}, random_config())
    content = saved(tmp_path, patch)
    assert unpacked(content)[1][A_SCALE][0] == "F32"
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.deltas[SLOT].a is not None and abs(loaded.deltas[SLOT].a[0, 0] / 1e-12 - 1) < 1e-3
    assert saved(tmp_path, loaded, None) == content


def test_the_largest_float_can_be_stored(tmp_path: Path) -> None:
    patch = Patch({SLOT: Delta(np.full((2, 1), np.finfo(np.float32).max), np.ones((1, 4)))}, random_config())
    saved(tmp_path, patch)
    Patch.load(tmp_path / "p.safetensors")


def test_the_safetensors_library_reads_an_int8_file_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    patch = replace(whole(), prefix=KVPrefix(arrays(entries=3, head_dim=3), (1, 2), 5))
    content = saved(tmp_path, patch)
    with safetensors.safe_open(tmp_path / "p.safetensors", "numpy") as opened:
        assert opened.get_tensor(A).dtype == np.int8 and opened.get_tensor(A_SCALE).dtype == np.float16
    position = 8 + int.from_bytes(content[:8], "little")
    for dtype, _shape, raw in unpacked(content)[1].values():
        assert position % {"F32": 4, "F16": 2, "I8": 1}[dtype] == 0
        position += len(raw)


def test_an_int8_file_has_about_half_the_bytes(tmp_path: Path) -> None:
    patch = random_patch(layers=4, inputs=512, outputs=256, ranks=16)
    assert len(saved(tmp_path, patch)) < 0.6 * len(saved(tmp_path, patch, "f16"))


# -- the version that is written, and the bytes that a patch reports -----------------------------------------


@pytest.mark.parametrize(
    ("patch", "dtype", "wanted"),
    [
        (random_patch(), "f16", "1"),
        (random_patch(), "f32", "1"),
        (random_patch(), "i8", "3"),
        (random_patch(ranks=0), "i8", "1"),  # biases are not int8
        (whole(), "f16", "2"),
        (whole(), "i8", "3"),
        (random_patch(config=random_config(stop=("\n",))), "f16", "3"),
        (whole(stop=("\n",)), "bf16", "3"),
    ],
)
def test_version_3_is_written_only_if_it_is_needed(tmp_path: Path, patch: Patch, dtype: str, wanted: str) -> None:
    content = saved(tmp_path, patch, dtype)
    assert version(content) == wanted
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.config == patch.config and loaded.identity == patch.rounded(dtype).identity


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "i8"])
@pytest.mark.parametrize("patch", [random_patch(), random_patch(ranks=0), whole(), whole(stop=("\n", "Q:"))])
def test_a_patch_reports_the_bytes_of_its_file(tmp_path: Path, patch: Patch, dtype: str) -> None:
    size = len(saved(tmp_path, patch, dtype))
    assert patch.rounded(dtype).nbytes == replace(patch, dtype=dtype).nbytes == size
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.nbytes == size and f"{size} bytes" in repr(loaded)


def test_a_patch_reports_the_bytes_of_a_file_that_another_program_wrote(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path, random_patch(), "f16"))
    metadata["config"]["name"] = "a longer name" * 9
    (tmp_path / "p.safetensors").write_bytes(packed(metadata, parts))
    assert Patch.load(tmp_path / "p.safetensors").nbytes == (tmp_path / "p.safetensors").stat().st_size


def test_results_of_the_algebra_are_stored_in_half_precision(tmp_path: Path) -> None:
    saved(tmp_path, random_patch())
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert {made.dtype for made in (0.5 * loaded, -loaded, loaded + random_patch(2))} == {"f16"}
    assert (1.0 * loaded).dtype == loaded.truncate(2).dtype == "i8"


def test_a_file_of_several_dtypes_is_saved_again_without_a_loss(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path, random_patch(), "f16"))
    parts[BIAS] = ("F32", [8], np.arange(8, dtype=np.float32).tobytes())
    (tmp_path / "p.safetensors").write_bytes(packed(metadata, parts))
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.dtype == "f32"
    saved(tmp_path, loaded, None)
    assert Patch.load(tmp_path / "p.safetensors").identity == loaded.identity


def test_a_file_with_int8_tensors_beside_others_is_saved_again_without_a_loss(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path, random_patch()))
    parts[BIAS] = ("F32", [8], np.full(8, 1e6, np.float32).tobytes())
    (tmp_path / "p.safetensors").write_bytes(packed(metadata, parts))
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.dtype == "f32"
    saved(tmp_path, loaded, None)
    assert Patch.load(tmp_path / "p.safetensors").identity == loaded.identity


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "i8"])
def test_layers_with_different_numbers_of_entries_need_version_3(tmp_path: Path, dtype: str) -> None:
    content = saved(tmp_path, ragged(), dtype)
    metadata, parts = unpacked(content)
    assert metadata["version"] == "3" and metadata["config"]["prefix"]["counts"] == [1, 2, 3]
    assert [parts[f"prefix.{layer}.key"][1] for layer in range(3)] == [[1, 2, 4], [2, 2, 4], [3, 2, 4]]
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.identity == ragged().rounded(dtype).identity and loaded.nbytes == len(content)
    assert saved(tmp_path, loaded, None) == content


@pytest.mark.parametrize("dtype", ["f16", "f32", "i8"])
def test_entries_in_front_of_a_system_message_need_version_3(tmp_path: Path, dtype: str) -> None:
    patch = Patch({}, random_config(method="prefix"), KVPrefix(arrays(), (1, 2), 5, before_system=True))
    content = saved(tmp_path, patch, dtype)
    metadata, _parts = unpacked(content)
    assert metadata["version"] == "3"
    assert metadata["config"]["prefix"] == {"replaces": [1, 2], "position": 5, "before_system": True, "counts": [3, 3]}
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.prefix is not None and loaded.prefix.before_system
    assert saved(tmp_path, loaded, None) == content

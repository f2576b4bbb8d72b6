"""Version 3 of the file: int8 tensors with scales, stop strings and counts; what it stores, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from runtime_tests.bad_patches import packed, refused, unpacked
from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.errors import PatchError, PatchFormatError, PatchShapeError, PatchValueError
from tp_runtime.patch import Delta, KVPrefix, Patch, read_tensors, round_to_int8

SLOT = (0, "mlp_out")
A, A_SCALE, BIAS, MEAN = (f"layers.0.mlp_out.{part}" for part in ("a", "a_scale", "bias", "mean"))
KEY, KEY_SCALE, VALUE_SCALE = "prefix.0.key", "prefix.0.key_scale", "prefix.0.value_scale"


def whole(**config: Any) -> Patch:
    """Return a patch with weights and entries."""
    return Patch(random_patch().deltas, random_config(**config), KVPrefix(arrays(), (1, 2), 5))


def saved(path: Path, patch: Patch | None = None, dtype: str | None = "i8") -> bytes:
    (patch or whole()).save(path / "p.safetensors", dtype)
    return (path / "p.safetensors").read_bytes()


def version(content: bytes) -> str:
    return str(unpacked(content)[0]["version"])


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


def ragged(**config: Any) -> Patch:
    """Return a patch of entries with another number of them in each layer."""
    entries = {key: values[: 1 + key[0]] for key, values in arrays(layers=3).items()}
    return Patch({}, random_config(method="prefix", **config), KVPrefix(entries, (1, 2), 5))


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


@pytest.mark.parametrize("value", [False, 1, "yes", None])
def test_another_value_of_before_system_is_refused(tmp_path: Path, value: Any) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    metadata["config"]["prefix"]["before_system"] = value
    (tmp_path / "p.safetensors").write_bytes(packed(metadata, parts))
    with pytest.raises(PatchFormatError, match=r"the patch's KV prefix is not complete.*\"before_system\": true"):
        Patch.load(tmp_path / "p.safetensors")


def test_version_2_has_no_before_system(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path, dtype="f32"))
    assert metadata["version"] == "2"
    metadata["config"]["prefix"]["before_system"] = True
    (tmp_path / "p.safetensors").write_bytes(packed(metadata, parts))
    with pytest.raises(PatchFormatError, match="the version does not fit a file with the key `before_system`"):
        Patch.load(tmp_path / "p.safetensors")


# -- what is refused: int8 tensors and scales ----------------------------------------------------------------


def changed(
    path: Path, name: str, dtype: str | None, shape: list[int] | None = None, raw: bytes | None = None
) -> bytes:
    """Return a valid file with another tensor of that name; without it, if `dtype` is None."""
    metadata, parts = unpacked(saved(path))
    if dtype is None:
        del parts[name]
    else:
        old = parts.get(name, ("", [], b""))
        parts[name] = (dtype, old[1] if shape is None else shape, old[2] if raw is None else raw)
    return packed(metadata, parts)


@pytest.mark.parametrize("name", [A_SCALE, KEY_SCALE, VALUE_SCALE])
def test_int8_without_its_scales_is_refused(tmp_path: Path, name: str) -> None:
    content = changed(tmp_path, name, None)
    refused(tmp_path, content, PatchFormatError, f"the int8 tensor has no scales; got no such tensor; wanted '{name}'")


def test_scales_without_their_tensor_are_refused(tmp_path: Path) -> None:
    content = changed(tmp_path, A, "F16", [12, 4], bytes(96))
    refused(
        tmp_path, content, PatchFormatError, f"{A_SCALE}: there are scales, but their tensor is not quantised; got F16"
    )
    content = changed(tmp_path, KEY, None)
    refused(
        tmp_path, content, PatchFormatError, "there are scales, but their tensor is not quantised; got no such tensor"
    )


@pytest.mark.parametrize("name", [A_SCALE, KEY_SCALE])
def test_scales_in_a_file_without_int8_are_refused(tmp_path: Path, name: str) -> None:
    metadata, parts = unpacked(saved(tmp_path, None, "f16"))
    parts[name] = ("F16", [4], bytes(8))
    refused(tmp_path, packed(metadata, parts), PatchFormatError, "there are scales, but their tensor is not quantised")


@pytest.mark.parametrize("name", [BIAS, MEAN])
def test_an_int8_bias_or_mean_is_refused(tmp_path: Path, name: str) -> None:
    size = 8 if name == BIAS else 12
    content = changed(tmp_path, name, "I8", [size], bytes(size))
    refused(tmp_path, content, PatchFormatError, f"{name}: this tensor may not be int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, -(2.0**-24)])
@pytest.mark.parametrize("name", [A_SCALE, KEY_SCALE])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path, name: str, value: float) -> None:
    size = 4 if name == A_SCALE else 8
    raw = np.array([1.0] * (size - 1) + [value], np.float16).tobytes()
    content = changed(tmp_path, name, "F16", None, raw)
    wanted = rf"{name}: a scale is NaN, infinite, zero or negative; got .*1 of {size} scales"
    refused(tmp_path, content, PatchValueError, wanted)


@pytest.mark.parametrize(
    ("name", "shape"), [(A_SCALE, [5]), (A_SCALE, [4, 1]), (A_SCALE, []), (KEY_SCALE, [4, 2]), (VALUE_SCALE, [2, 3])]
)
def test_scales_of_a_wrong_shape_are_refused(tmp_path: Path, name: str, shape: list[int]) -> None:
    raw = np.ones(shape, np.float16).tobytes()
    content = changed(tmp_path, name, "F16", shape, raw)
    refused(tmp_path, content, PatchShapeError, f"{name}: the scales do not fit their tensor; got ")


@pytest.mark.parametrize("shape", [[48], []])
def test_an_int8_tensor_with_too_few_dimensions_is_refused(tmp_path: Path, shape: list[int]) -> None:
    content = changed(tmp_path, "layers.0.mlp_out.b", "I8", shape, bytes(48 if shape else 1))
    refused(tmp_path, content, PatchShapeError, "the scales do not fit their tensor")


@pytest.mark.parametrize("dtype", ["BF16", "I8"])
def test_scales_of_another_dtype_are_refused(tmp_path: Path, dtype: str) -> None:
    content = changed(tmp_path, A_SCALE, dtype, [4], b"\1" * (4 if dtype == "I8" else 8))
    refused(tmp_path, content, PatchFormatError, f"the scales have a wrong dtype; got {dtype}; wanted F16 or F32")


def test_an_int8_value_without_a_positive_counterpart_is_refused(tmp_path: Path) -> None:
    content = changed(tmp_path, A, "I8", None, b"\x80" + bytes(47))
    refused(tmp_path, content, PatchValueError, r"the int8 values are not symmetric; got -128; wanted -127\.\.127")


def test_a_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    content = changed(tmp_path, A_SCALE, "F32", [4], np.full(4, 3e38, np.float32).tobytes())
    refused(tmp_path, content, PatchValueError, "layers.0.mlp_out.a: the tensor holds NaN or infinity")


@pytest.mark.parametrize("dtype", ["F16", "I8"])
@pytest.mark.parametrize("number", ["2", "3"])
def test_entries_without_dimensions_are_refused(tmp_path: Path, dtype: str, number: str) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    metadata["version"] = number
    parts[KEY] = (dtype, [], bytes(2 if dtype == "F16" else 1))
    (tmp_path / "p.safetensors").write_bytes(packed(metadata, parts))
    with pytest.raises(PatchError):
        Patch.load(tmp_path / "p.safetensors")


def test_int8_in_a_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(PatchFormatError, match=r"unsupported dtype; got 'I8'; wanted F16 \| BF16 \| F32"):
        read_tensors(tmp_path / "p.safetensors")


# -- what is refused: versions and keys ----------------------------------------------------------------------


def with_config(content: bytes, number: str | None = None, **changes: Any) -> bytes:
    """Return the file with another version, and with these values in its config; None removes a key."""
    metadata, parts = unpacked(content)
    metadata["version"] = number or metadata["version"]
    config = {**metadata["config"], **changes}
    metadata["config"] = {key: value for key, value in config.items() if value is not None}
    return packed(metadata, parts)


@pytest.mark.parametrize(("patch", "number"), [(random_patch(), "1"), (whole(), "2"), (whole(), "1")])
def test_int8_in_an_older_version_is_refused(tmp_path: Path, patch: Patch, number: str) -> None:
    content = with_config(saved(tmp_path, patch), number)
    wanted = f"the version does not fit a file with int8 values in '{A}'; got '{number}'; wanted '3'"
    refused(tmp_path, content, PatchFormatError, wanted)


@pytest.mark.parametrize(("patch", "number"), [(random_patch(), "1"), (whole(), "2")])
@pytest.mark.parametrize("stop", [[], ["\n"]])
def test_stop_in_an_older_version_is_refused(tmp_path: Path, patch: Patch, number: str, stop: list[str]) -> None:
    content = with_config(saved(tmp_path, patch, "f16"), stop=stop)
    assert version(content) == number
    refused(tmp_path, content, PatchFormatError, f"the version does not fit a file with the key `stop`; got '{number}'")


def test_counts_in_an_older_version_are_refused(tmp_path: Path) -> None:
    content = with_config(saved(tmp_path, None, "f16"), prefix={"replaces": [1, 2], "position": 5, "counts": [3, 3]})
    refused(tmp_path, content, PatchFormatError, "does not fit a file with the key `counts` of `prefix`; got '2'")


@pytest.mark.parametrize(("patch", "dtype"), [(random_patch(), "f16"), (whole(), "f16"), (whole(), "i8")])
def test_version_3_without_stop_is_refused(tmp_path: Path, patch: Patch, dtype: str) -> None:
    content = with_config(saved(tmp_path, patch, dtype), "3", stop=None)
    refused(tmp_path, content, PatchFormatError, "config: a file of version 3 lacks the key `stop`")


@pytest.mark.parametrize("dtype", ["f16", "i8"])
def test_version_3_without_counts_is_refused(tmp_path: Path, dtype: str) -> None:
    prefix = {"replaces": [1, 2], "position": 5}
    content = with_config(saved(tmp_path, None, dtype), "3", stop=[], prefix=prefix)
    refused(tmp_path, content, PatchFormatError, r"config\.prefix: a file of version 3 lacks the key `counts`")


@pytest.mark.parametrize("counts", [[3], [3, 4], [3, 3, 3], []])
def test_counts_that_are_not_those_of_the_tensors_are_refused(tmp_path: Path, counts: list[int]) -> None:
    content = with_config(saved(tmp_path), prefix={"replaces": [1, 2], "position": 5, "counts": counts})
    refused(tmp_path, content, PatchShapeError, r"config\.prefix\.counts: .*; wanted \[3, 3\]")


def test_different_numbers_of_entries_in_an_older_version_are_refused(tmp_path: Path) -> None:
    content = with_config(saved(tmp_path, ragged(), "f16"), "2", stop=None, prefix={"replaces": [1], "position": 5})
    refused(tmp_path, content, PatchFormatError, "does not fit a file with a number of entries that differs.*got '2'")


@pytest.mark.parametrize("counts", [None, 3, "33", [3.0, 3], [True, 3], [-3, 3], [[3], 3], {"0": 3}])
def test_counts_of_a_wrong_type_are_refused(tmp_path: Path, counts: Any) -> None:
    content = with_config(saved(tmp_path), prefix={"replaces": [1, 2], "position": 5, "counts": counts})
    refused(tmp_path, content, PatchFormatError, r"config\.prefix: the patch's KV prefix is not complete")


@pytest.mark.parametrize(
    "stop", [0, "\n", {"a": 1}, [""], ["\n", ""], [1], [None], [["\n"]], [str(i) for i in range(17)]]
)
def test_bad_stop_strings_are_refused(tmp_path: Path, stop: Any) -> None:
    content = with_config(saved(tmp_path), stop=stop)
    refused(tmp_path, content, PatchFormatError, r"config\.stop")


def test_stop_that_is_null_is_refused(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    metadata["config"]["stop"] = None
    refused(tmp_path, packed(metadata, parts), PatchFormatError, r"config\.stop: .*; got NoneType")


def test_version_3_may_hold_what_an_older_version_holds(tmp_path: Path) -> None:
    """Only the writer takes the lowest version; another program need not."""
    for patch, more in ((random_patch(), {}), (whole(), {"replaces": [1, 2], "position": 5, "counts": [3, 3]})):
        content = with_config(saved(tmp_path, patch, "f32"), "3", stop=[], prefix=more or None)
        (tmp_path / "p.safetensors").write_bytes(content)
        assert Patch.load(tmp_path / "p.safetensors").identity == patch.identity


def test_every_removed_tensor_of_an_int8_file_is_noticed(tmp_path: Path) -> None:
    metadata, parts = unpacked(saved(tmp_path))
    optional = {name for name in parts if name.endswith((".mean", ".bias"))}
    for name in parts:
        rest = {other: tensor for other, tensor in parts.items() if other != name}
        (tmp_path / "p.safetensors").write_bytes(packed(metadata, rest))
        if name in optional:
            Patch.load(tmp_path / "p.safetensors")
        else:
            with pytest.raises(PatchError):
                Patch.load(tmp_path / "p.safetensors")

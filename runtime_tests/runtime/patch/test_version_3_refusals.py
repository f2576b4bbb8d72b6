"""Version 3 of the file: what is refused of int8 tensors and their scales, and of versions and their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.bad_patches import changed, packed, refused, unpacked
from runtime_tests.patches import random_patch
from tp_runtime.errors import PatchError, PatchFormatError, PatchShapeError, PatchValueError
from tp_runtime.patch import Patch, read_tensors

from .version_3 import (
    A_SCALE,
    BIAS,
    KEY,
    KEY_SCALE,
    MEAN,
    VALUE_SCALE,
    A,
    ragged,
    saved,
    version,
    whole,
    with_config,
)

# -- what is refused: int8 tensors and scales ----------------------------------------------------------------


@pytest.mark.parametrize("name", [A_SCALE, KEY_SCALE, VALUE_SCALE])
def test_int8_without_its_scales_is_refused(tmp_path: Path, name: str) -> None:
    content = changed(saved(tmp_path), name, None)
    refused(tmp_path, content, PatchFormatError, f"the int8 tensor has no scales; got no such tensor; wanted '{name}'")


def test_scales_without_their_tensor_are_refused(tmp_path: Path) -> None:
    content = changed(saved(tmp_path), A, "F16", [12, 4], bytes(96))
    refused(
        tmp_path, content, PatchFormatError, f"{A_SCALE}: there are scales, but their tensor is not quantised; got F16"
    )
    content = changed(saved(tmp_path), KEY, None)
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
    content = changed(saved(tmp_path), name, "I8", [size], bytes(size))
    refused(tmp_path, content, PatchFormatError, f"{name}: this tensor may not be int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, -(2.0**-24)])
@pytest.mark.parametrize("name", [A_SCALE, KEY_SCALE])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path, name: str, value: float) -> None:
    size = 4 if name == A_SCALE else 8
    raw = np.array([1.0] * (size - 1) + [value], np.float16).tobytes()
    content = changed(saved(tmp_path), name, "F16", None, raw)
    wanted = rf"{name}: a scale is NaN, infinite, zero or negative; got .*1 of {size} scales"
    refused(tmp_path, content, PatchValueError, wanted)


@pytest.mark.parametrize(
    ("name", "shape"), [(A_SCALE, [5]), (A_SCALE, [4, 1]), (A_SCALE, []), (KEY_SCALE, [4, 2]), (VALUE_SCALE, [2, 3])]
)
def test_scales_of_a_wrong_shape_are_refused(tmp_path: Path, name: str, shape: list[int]) -> None:
    raw = np.ones(shape, np.float16).tobytes()
    content = changed(saved(tmp_path), name, "F16", shape, raw)
    refused(tmp_path, content, PatchShapeError, f"{name}: the scales do not fit their tensor; got ")


@pytest.mark.parametrize("shape", [[48], []])
def test_an_int8_tensor_with_too_few_dimensions_is_refused(tmp_path: Path, shape: list[int]) -> None:
    content = changed(saved(tmp_path), "layers.0.mlp_out.b", "I8", shape, bytes(48 if shape else 1))
    refused(tmp_path, content, PatchShapeError, "the scales do not fit their tensor")


@pytest.mark.parametrize("dtype", ["BF16", "I8"])
def test_scales_of_another_dtype_are_refused(tmp_path: Path, dtype: str) -> None:
    content = changed(saved(tmp_path), A_SCALE, dtype, [4], b"\1" * (4 if dtype == "I8" else 8))
    refused(tmp_path, content, PatchFormatError, f"the scales have a wrong dtype; got {dtype}; wanted F16 or F32")


def test_an_int8_value_without_a_positive_counterpart_is_refused(tmp_path: Path) -> None:
    content = changed(saved(tmp_path), A, "I8", None, b"\x80" + bytes(47))
    refused(tmp_path, content, PatchValueError, r"the int8 values are not symmetric; got -128; wanted -127\.\.127")


def test_a_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    content = changed(saved(tmp_path), A_SCALE, "F32", [4], np.full(4, 3e38, np.float32).tobytes())
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

"""Well-formed safetensors files whose metadata or tensors are not a valid patch: one test for each defect."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from runtime_tests.bad_patches import CONFIG, METADATA, container, entry, malformed, refused, tensors
from tp_runtime.errors import PatchShapeError, PatchTargetError, PatchValueError, PatchVersionError

# -- PatchFormatError and PatchVersionError: metadata --------------------------------------------------------


@pytest.mark.parametrize("metadata", [{}, {**METADATA, "format": "pt"}, {"format": "pt"}, "tp-patch", None, []])
def test_metadata_of_another_format_is_refused(tmp_path, metadata):
    malformed(tmp_path, tensors(metadata=metadata), "not a patch.*wanted format 'tp-patch'")


def test_an_ordinary_safetensors_file_is_refused(tmp_path):
    content = safetensors.numpy.save({"model.embed.weight": np.ones((2, 2), np.float32)})
    malformed(tmp_path, content, "a safetensors file, but not a patch")


@pytest.mark.parametrize("config", [None, "", "{", "[]", "null", '{"name": NaN}', '{"name": "\ud800"}'])
def test_a_missing_or_unreadable_config_is_refused(tmp_path, config):
    metadata = {"format": "tp-patch", "version": "1"} | ({} if config is None else {"config": config})
    malformed(tmp_path, tensors(metadata=metadata), "the config|the header|no config")


def test_a_config_that_is_not_text_is_refused(tmp_path):
    malformed(tmp_path, tensors(metadata={**METADATA, "config": {"name": "x"}}), "no config")


def test_a_wrong_type_in_the_config_is_refused(tmp_path):
    config = json.dumps({**json.loads(CONFIG), "ridge": "one"})
    malformed(tmp_path, tensors(metadata={**METADATA, "config": config}), r"config\.ridge.*got str; wanted a number")


@pytest.mark.parametrize("version", ["5", "0", "1.0", "", 1, None])
def test_an_unknown_version_is_refused(tmp_path, version):
    metadata = {**METADATA, "version": version, "new": "thing"}
    refused(
        tmp_path, tensors(metadata=metadata), PatchVersionError, r"unknown version.*wanted '1' \| '2' \| '3' \| '4'"
    )


def test_an_unknown_metadata_key_is_refused(tmp_path):
    refused(
        tmp_path,
        tensors(metadata={**METADATA, "new": "x"}),
        PatchVersionError,
        "unknown metadata key; got 'new'",
    )


def test_an_unknown_config_key_is_refused(tmp_path):
    metadata = {**METADATA, "config": json.dumps({**json.loads(CONFIG), "gate": 1})}
    refused(tmp_path, tensors(metadata=metadata), PatchVersionError, "unknown key.*'gate'")


def test_an_unknown_method_is_refused(tmp_path):
    metadata = {**METADATA, "config": json.dumps({**json.loads(CONFIG), "method": "magic"})}
    refused(tmp_path, tensors(metadata=metadata), PatchVersionError, "the method is unknown; got 'magic'")


# -- PatchTargetError, PatchShapeError, PatchValueError: tensors ---------------------------------------------


def test_a_file_without_tensors_is_refused(tmp_path):
    refused(tmp_path, container({"__metadata__": METADATA}), PatchTargetError, "holds no delta")


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.bias",
        "layers.0.mlp_out.c",
        "layers.00.mlp_out.bias",
        "layers.-1.mlp_out.bias",
        "layers.١.mlp_out.bias",
        "layers.1000000.mlp_out.bias",
        "layers.0.mlp_out.bias\n",
        "model.layers.0.mlp_out.bias",
        "",
    ],
)
def test_an_unknown_slot_is_refused(tmp_path, name):
    content = container({"__metadata__": METADATA, name: entry()}, bytes(8))
    refused(tmp_path, content, PatchTargetError, "does not address a slot or the KV prefix")


@pytest.mark.parametrize("part", ["a", "b"])
def test_half_of_a_pair_is_refused(tmp_path, part):
    refused(tmp_path, tensors(**{part: entry(shape=(1, 2))}), PatchTargetError, f"half of a pair; got {part}")


def test_a_mean_without_a_pair_is_refused(tmp_path):
    refused(tmp_path, tensors(mean=entry()), PatchTargetError, "mean without a pair")


def test_factors_of_different_ranks_are_refused(tmp_path):
    content = tensors(bytes(16), a=entry(0, 8, shape=(2, 1)), b=entry(8, 16, shape=(2, 1)))
    refused(tmp_path, content, PatchShapeError, r"mlp_out\.b.*got \[2, 1\]; wanted \[1, 1\]")


def test_a_bias_of_two_dimensions_is_refused(tmp_path):
    refused(tmp_path, tensors(bias=entry(shape=(1, 2))), PatchShapeError, r"wanted 1 dimension")


def test_scalar_and_empty_tensors_are_refused(tmp_path):
    refused(tmp_path, tensors(bytes(4), bias=entry(0, 4, shape=())), PatchShapeError, r"got \[\]")
    refused(tmp_path, tensors(b"", bias=entry(0, 0, shape=(0,))), PatchShapeError, r"got \[0\]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_nan_and_infinity_are_refused(tmp_path, value, dtype):
    word = np.float16(value).tobytes() if dtype == "F16" else np.float32(value).tobytes()[-2:]
    data = np.float32(value).tobytes() * 2 if dtype == "F32" else word * 2
    content = tensors(data, bias=entry(0, len(data), dtype))
    refused(tmp_path, content, PatchValueError, "NaN or infinity; got 2 of 2 values")

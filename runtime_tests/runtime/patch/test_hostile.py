"""Hostile values in every place of a patch file: the file loads, or an error names the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.bad_patches import METADATA, container, entry, malformed, tensors
from runtime_tests.hostile import check_error, some_variants
from runtime_tests.patches import random_patch
from tp_runtime.errors import PatchError, PatchFormatError
from tp_runtime.patch import Patch


@pytest.mark.parametrize("shape", [(2**32, 2**30, 0), (0, 2**32, 2**32), (2**32, 0, 2**32), (2**31, 2**31, 0)])
def test_an_empty_tensor_whose_other_dimensions_overflow_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    malformed(tmp_path, tensors(bias=entry(0, 0, "F32", shape)), "the size of tensor .* overflows")


@pytest.mark.parametrize("shape", ["9" * 5000, "1e400", "1e1", "-0.0", "[" * 100_000])
def test_a_dimension_that_is_no_ordinary_number_is_refused(tmp_path: Path, shape: str) -> None:
    text = json.dumps({"__metadata__": METADATA, "layers.0.mlp_out.bias": entry()}).replace("[2]", f"[{shape}]")
    malformed(tmp_path, container(text.encode(), bytes(8)), "the header|a bad shape")


def test_a_dimension_of_minus_zero_is_zero(tmp_path: Path) -> None:
    """JSON allows -0; Python reads it as 0."""
    text = json.dumps({"__metadata__": METADATA, "layers.0.mlp_out.bias": entry()}).replace("[2]", "[-0]")
    (tmp_path / "p.safetensors").write_bytes(container(text.encode(), bytes(8)))
    with pytest.raises(PatchFormatError, match="does not fill its byte range; got 8 bytes; wanted 0"):
        Patch.load(tmp_path / "p.safetensors")


def test_a_long_tensor_name_is_cut_in_the_message(tmp_path: Path) -> None:
    malformed(tmp_path, container({"__metadata__": METADATA, "x" * 10**6: entry(dtype="I7")}, bytes(8)), "unsupported")


@pytest.fixture(scope="module", params=["f16", "i8"])
def valid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hostile") / "p.safetensors"
    random_patch(layers=1, ranks=2, inputs=4, outputs=3, sites=("mlp_out",)).save(path, request.param)
    return path.read_bytes()


def header_of(content: bytes) -> dict[str, Any]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert isinstance(header, dict)
    return header


def load_or_refuse(folder: Path, header: str, valid: bytes, what: str) -> None:
    """Assert that the file raises a PatchError that can be printed, or loads as a patch that can be saved."""
    data = valid[8 + int.from_bytes(valid[:8], "little") :]
    path = folder / "p.safetensors"
    path.write_bytes(container(header.encode(), data))
    try:
        patch = Patch.load(path)
    except PatchError as error:
        check_error(error, what)
        return
    assert repr(patch).isprintable() and len(patch.identity) == 64, what
    (patch + 0.5 * patch).save(folder / "again.safetensors", dtype="f32")


def test_any_hostile_value_in_the_header_loads_or_raises_a_patch_error(tmp_path: Path, valid: bytes) -> None:
    for what, text in some_variants(header_of(valid), 500):
        load_or_refuse(tmp_path, text, valid, what)


def test_any_hostile_value_in_the_config_loads_or_raises_a_patch_error(tmp_path: Path, valid: bytes) -> None:
    header = header_of(valid)
    for what, text in some_variants(json.loads(header["__metadata__"]["config"]), 500):
        header["__metadata__"]["config"] = text
        load_or_refuse(tmp_path, json.dumps(header), valid, what)

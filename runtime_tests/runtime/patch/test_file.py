"""The container of a patch file: one test for each defect that the error table lists."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import zipfile

import numpy as np
import pytest

from runtime_tests.bad_patches import BIAS, CONFIG, METADATA, container, entry, malformed, refused, tensors
from tp_runtime.errors import PatchFormatError
from tp_runtime.patch import Patch
from tp_runtime.patch import container as patch_container


def test_the_valid_file_loads(tmp_path):
    (tmp_path / "p.safetensors").write_bytes(tensors())
    assert Patch.load(tmp_path / "p.safetensors").ranks == {(0, "mlp_out"): 0}


# -- PatchFormatError: the container -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_truncated_before_the_header_length_is_refused(tmp_path, size):
    malformed(tmp_path, tensors()[:size], f"truncated; got {size} bytes; wanted >= 8 bytes")


def test_a_truncated_header_is_refused(tmp_path):
    malformed(tmp_path, tensors()[:100], "the header length goes past the end of the file")


def test_truncated_tensors_are_refused(tmp_path):
    malformed(tmp_path, tensors()[:-1], "truncated; got 7 bytes of tensors; wanted 8 bytes")


def test_a_header_over_the_size_limit_is_refused(tmp_path):
    malformed(tmp_path, (16 << 20 | 1).to_bytes(8, "little") + b"{" + bytes(100), "the header length is over the limit")


def test_a_header_length_of_all_ones_is_refused(tmp_path):
    malformed(tmp_path, b"\xff" * 8 + b"{}", "over the limit; got 18446744073709551615")


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    malformed(tmp_path, (1000).to_bytes(8, "little") + b"{}", "past the end of the file; got 1000; wanted <= 2 bytes")


def test_an_empty_header_is_refused(tmp_path):
    malformed(tmp_path, container(b""), "not valid JSON")


@pytest.mark.parametrize("text", [b"{", b"{]", b"{'a':1}", b"{\xff}", b'{"a":1}x', b'{"a":' + b"9" * 5000 + b"}"])
def test_a_header_that_is_not_json_is_refused(tmp_path, text):
    malformed(tmp_path, container(text), "header is not valid JSON")


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    malformed(tmp_path, container(b'{"a":' + b"[" * 200_000), "header is not valid JSON")


@pytest.mark.parametrize("text", [b"[]", b"1", b'"x"', b"null"])
def test_a_header_that_is_not_an_object_is_refused(tmp_path, text):
    malformed(tmp_path, container(text), "header is not a JSON object")


def test_json_with_nan_is_refused(tmp_path):
    malformed(tmp_path, container(b'{"a":NaN}'), "number that JSON does not have; got NaN")


def test_a_duplicate_tensor_is_refused(tmp_path):
    text = json.dumps({"__metadata__": METADATA, BIAS: entry()})
    text = text[:-1] + f', "{BIAS}": {json.dumps(entry())}}}'
    malformed(tmp_path, container(text.encode(), bytes(8)), f"header holds a duplicate key; got '{BIAS}'")


def test_a_duplicate_key_in_an_entry_is_refused(tmp_path):
    text = json.dumps({"__metadata__": METADATA, BIAS: entry()}).replace('"dtype"', '"dtype": "F16", "dtype"')
    malformed(tmp_path, container(text.encode(), bytes(8)), "duplicate key; got 'dtype'")


def test_a_duplicate_key_in_the_config_is_refused(tmp_path):
    twice = CONFIG[:-1] + ', "name": "other"}'
    malformed(tmp_path, tensors(metadata={**METADATA, "config": twice}), "config holds a duplicate key; got 'name'")


def test_overlapping_tensors_are_refused(tmp_path):
    content = tensors(bytes(12), a=entry(0, 8), bias=entry(4, 12))
    malformed(tmp_path, content, "overlaps another; got begin 4; wanted begin 8")


def test_two_tensors_with_the_same_range_are_refused(tmp_path):
    malformed(tmp_path, tensors(bytes(8), a=entry(), bias=entry()), "overlaps another")


def test_a_hole_between_tensors_is_refused(tmp_path):
    malformed(tmp_path, tensors(bytes(20), a=entry(0, 8), bias=entry(12, 20)), "hole before tensor.*begin 12")


def test_a_hole_before_the_first_tensor_is_refused(tmp_path):
    malformed(tmp_path, tensors(bytes(12), bias=entry(4, 12)), "hole before tensor.*wanted begin 0")


def test_trailing_bytes_are_refused(tmp_path):
    malformed(tmp_path, tensors() + b"\0", "trailing bytes.*got 9 bytes; wanted 8 bytes")


def test_trailing_bytes_without_tensors_are_refused(tmp_path):
    malformed(tmp_path, container({"__metadata__": METADATA}, b"payload"), "trailing bytes")


@pytest.mark.parametrize("shape", [[2**62, 4], [2**64], [10**30, 10**30], [2**32, 2**32]])
def test_a_size_that_overflows_is_refused(tmp_path, shape):
    malformed(tmp_path, tensors(bias=entry(shape=shape)), "the size of tensor .* overflows")


def test_a_size_that_wraps_to_the_right_one_is_refused(tmp_path):
    # 4 * (2^62 + 2) wraps to 8 in 64 bits.
    malformed(tmp_path, tensors(bias=entry(shape=[2**62 + 2])), "the size of tensor .* overflows")


def test_a_byte_range_that_does_not_match_the_shape_is_refused(tmp_path):
    malformed(tmp_path, tensors(bias=entry(shape=[1])), "does not fill its byte range; got 8 bytes; wanted 4")


@pytest.mark.parametrize("offsets", [[8, 0], [-8, 0], [0], [0, 8, 8], "08", [0, 8.0], [False, 8], None])
def test_bad_offsets_are_refused(tmp_path, offsets):
    malformed(tmp_path, tensors(bias={**entry(), "data_offsets": offsets}), "bad offsets")


@pytest.mark.parametrize("dtype", ["F64", "U16", "BOOL", "F8_E4M3", "f32", "", None, ["F32"]])
def test_an_unsupported_dtype_is_refused(tmp_path, dtype):
    malformed(tmp_path, tensors(bias=entry(dtype=dtype)), r"unsupported dtype.*wanted F16 \| BF16 \| F32 \| I8 \| U8")


@pytest.mark.parametrize("shape", [[-2], [2, -1], [-1, -2]])
def test_a_negative_dimension_is_refused(tmp_path, shape):
    malformed(tmp_path, tensors(bias=entry(shape=shape)), "bad shape.*none negative")


@pytest.mark.parametrize("shape", [[1, 1, 1, 2], [2.0], [True, 2], "2", {"0": 2}, None])
def test_a_bad_shape_is_refused(tmp_path, shape):
    malformed(tmp_path, tensors(bias={**entry(), "shape": shape}), "bad shape")


@pytest.mark.parametrize("value", [[], 1, None, {}, {"dtype": "F32"}, {**entry(), "strides": [1]}])
def test_a_badly_described_tensor_is_refused(tmp_path, value):
    malformed(tmp_path, tensors(bias=value), "badly described")


def test_a_file_over_the_size_limit_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    with path.open("wb") as handle:
        handle.truncate(patch_container.MAX_FILE_BYTES + 1)  # the file is sparse, so it needs no disk space
    with pytest.raises(PatchFormatError, match="the file is too large"):
        Patch.load(path)


def test_half_a_surrogate_in_a_name_is_refused(tmp_path):
    header = {"__metadata__": METADATA, "\ud800": entry()}
    malformed(tmp_path, container(header, bytes(8)), "the header holds half of a surrogate pair")


# -- PatchFormatError: not a file ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.safetensors", "file/p.safetensors", "a\0b", "x" * 300, "loop", "socket"])
def test_a_path_without_a_file_is_refused(tmp_path, name, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)  # the path of a socket is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(
            PatchFormatError, match=r"there is no such file|the path is not (valid|a regular file)"
        ) as caught:
            Patch.load(tmp_path / name)
    assert caught.value.field and caught.value.fix == "check the path"


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(PatchFormatError, match="not a regular file; got p"):
        Patch.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/"])
def test_devices_and_folders_are_refused(path):
    with pytest.raises(PatchFormatError, match="not a regular file"):
        Patch.load(path)


def test_a_symlink_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(tensors())
    (tmp_path / "p.safetensors").symlink_to("blob")
    assert Patch.load(tmp_path / "p.safetensors").name == "pirate"


def test_missing_permission_raises_the_systems_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        Patch.load(tmp_path / "p.safetensors")


# -- PatchFormatError: unsafe formats ------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".zip", ".PT"])
def test_an_unsafe_suffix_is_refused(tmp_path, suffix):
    # The name decides: the file is refused although its content is good, and would be even if it did not exist.
    refused(tmp_path, tensors(), PatchFormatError, f"unsafe format.*got a {suffix} file", f"p{suffix}")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [Bomb(), list(range(300)), None], ids=["bomb", "list", "none"])
def test_pickle_content_is_refused(tmp_path, protocol, value):
    malformed(tmp_path, pickle.dumps(value, protocol), "unsafe format.*got pickle content")


def test_zip_content_is_refused(tmp_path):
    malformed(tmp_path, zipped(), "unsafe format.*zip, .pt or .npz content")


@pytest.mark.parametrize("mtime", [0, 1_700_000_000])
def test_gzip_content_is_refused(tmp_path, mtime):
    malformed(tmp_path, gzip.compress(tensors() * 3, mtime=mtime), "unsafe format.*gzip content")


def test_npz_and_npy_content_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    malformed(tmp_path, buffer.getvalue(), "unsafe format")
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    malformed(tmp_path, buffer.getvalue(), "unsafe format")


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50, 0x8B1F])
def test_a_header_length_that_looks_like_another_format_is_accepted(tmp_path, length):
    # 0x80 0x02 starts a pickle, "PK" a zip file, and 0x1f 0x8b a gzip file. Each is also a valid header length.
    config = {key: value for key, value in json.loads(CONFIG).items() if not isinstance(value, dict)}
    header = {"__metadata__": {**METADATA, "config": json.dumps(config)}, BIAS: entry()}
    text = json.dumps(header, separators=(",", ":")).encode()
    path = tmp_path / "p.safetensors"
    path.write_bytes(container(text.ljust(length), bytes(8)))
    assert Patch.load(path).name == "pirate"

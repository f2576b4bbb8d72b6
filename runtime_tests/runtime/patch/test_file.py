"""Every bad patch file of the error table, one named test each."""

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
import safetensors
import safetensors.numpy

from runtime_tests.bad_patches import BIAS, CONFIG, METADATA, container, entry, malformed, refused, tensors
from tp_runtime.errors import PatchFormatError
from tp_runtime.patch import Patch
from tp_runtime.patch import file as patch_file


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "p.safetensors").write_bytes(tensors())
    assert Patch.load(tmp_path / "p.safetensors").ranks == {(0, "mlp_out"): 0}


# -- PatchFormatError: the container ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_truncated_before_the_header_length(tmp_path, size):
    malformed(tmp_path, tensors()[:size], f"truncated; got {size} bytes; wanted >= 8 bytes")


def test_truncated_header(tmp_path):
    malformed(tmp_path, tensors()[:100], "the header length goes past the end of the file")


def test_truncated_tensors(tmp_path):
    malformed(tmp_path, tensors()[:-1], "truncated; got 7 bytes of tensors; wanted 8 bytes")


def test_header_over_cap(tmp_path):
    malformed(tmp_path, (16 << 20 | 1).to_bytes(8, "little") + b"{" + bytes(100), "the header length is over the limit")


def test_header_length_of_all_ones(tmp_path):
    malformed(tmp_path, b"\xff" * 8 + b"{}", "over the limit; got 18446744073709551615")


def test_header_over_file(tmp_path):
    malformed(tmp_path, (1000).to_bytes(8, "little") + b"{}", "past the end of the file; got 1000; wanted <= 2 bytes")


def test_empty_header(tmp_path):
    malformed(tmp_path, container(b""), "not valid JSON")


@pytest.mark.parametrize("text", [b"{", b"{]", b"{'a':1}", b"{\xff}", b'{"a":1}x', b'{"a":' + b"9" * 5000 + b"}"])
def test_bad_json(tmp_path, text):
    malformed(tmp_path, container(text), "header is not valid JSON")


def test_json_nested_too_deep(tmp_path):
    malformed(tmp_path, container(b'{"a":' + b"[" * 200_000), "header is not valid JSON")


@pytest.mark.parametrize("text", [b"[]", b"1", b'"x"', b"null"])
def test_header_not_an_object(tmp_path, text):
    malformed(tmp_path, container(text), "header is not a JSON object")


def test_json_with_nan(tmp_path):
    malformed(tmp_path, container(b'{"a":NaN}'), "number that JSON does not have; got NaN")


def test_duplicate_tensor(tmp_path):
    text = json.dumps({"__metadata__": METADATA, BIAS: entry()})
    text = text[:-1] + f', "{BIAS}": {json.dumps(entry())}}}'
    malformed(tmp_path, container(text.encode(), bytes(8)), f"header holds a duplicate key; got '{BIAS}'")


def test_duplicate_key_in_an_entry(tmp_path):
    text = json.dumps({"__metadata__": METADATA, BIAS: entry()}).replace('"dtype"', '"dtype": "F16", "dtype"')
    malformed(tmp_path, container(text.encode(), bytes(8)), "duplicate key; got 'dtype'")


def test_duplicate_key_in_the_config(tmp_path):
    twice = CONFIG[:-1] + ', "name": "other"}'
    malformed(tmp_path, tensors(metadata={**METADATA, "config": twice}), "config holds a duplicate key; got 'name'")


def test_overlap(tmp_path):
    content = tensors(bytes(12), a=entry(0, 8), bias=entry(4, 12))
    malformed(tmp_path, content, "overlaps another; got begin 4; wanted begin 8")


def test_same_range_twice(tmp_path):
    malformed(tmp_path, tensors(bytes(8), a=entry(), bias=entry()), "overlaps another")


def test_hole(tmp_path):
    malformed(tmp_path, tensors(bytes(20), a=entry(0, 8), bias=entry(12, 20)), "hole before tensor.*begin 12")


def test_hole_at_the_start(tmp_path):
    malformed(tmp_path, tensors(bytes(12), bias=entry(4, 12)), "hole before tensor.*wanted begin 0")


def test_trailing_bytes(tmp_path):
    malformed(tmp_path, tensors() + b"\0", "trailing bytes.*got 9 bytes; wanted 8 bytes")


def test_trailing_bytes_without_tensors(tmp_path):
    malformed(tmp_path, container({"__metadata__": METADATA}, b"payload"), "trailing bytes")


@pytest.mark.parametrize("shape", [[2**62, 4], [2**64], [10**30, 10**30], [2**32, 2**32]])
def test_size_overflow(tmp_path, shape):
    malformed(tmp_path, tensors(bias=entry(shape=shape)), "the size of tensor .* overflows")


def test_size_that_wraps_to_the_right_one(tmp_path):
    # 4 * (2^62 + 2) is 8 in 64 bits.
    malformed(tmp_path, tensors(bias=entry(shape=[2**62 + 2])), "the size of tensor .* overflows")


def test_range_of_another_size_than_the_shape(tmp_path):
    malformed(tmp_path, tensors(bias=entry(shape=[1])), "does not fill its byte range; got 8 bytes; wanted 4")


@pytest.mark.parametrize("offsets", [[8, 0], [-8, 0], [0], [0, 8, 8], "08", [0, 8.0], [False, 8], None])
def test_bad_offsets(tmp_path, offsets):
    malformed(tmp_path, tensors(bias={**entry(), "data_offsets": offsets}), "bad offsets")


@pytest.mark.parametrize("dtype", ["F64", "I8", "BOOL", "F8_E4M3", "f32", "", None, ["F32"]])
def test_unsupported_dtype(tmp_path, dtype):
    malformed(tmp_path, tensors(bias=entry(dtype=dtype)), "unsupported dtype.*wanted F16 | BF16 | F32")


@pytest.mark.parametrize("shape", [[-2], [2, -1], [-1, -2]])
def test_negative_dimension(tmp_path, shape):
    malformed(tmp_path, tensors(bias=entry(shape=shape)), "bad shape.*none negative")


@pytest.mark.parametrize("shape", [[1, 1, 1, 2], [2.0], [True, 2], "2", {"0": 2}, None])
def test_bad_shape_description(tmp_path, shape):
    malformed(tmp_path, tensors(bias={**entry(), "shape": shape}), "bad shape")


@pytest.mark.parametrize("value", [[], 1, None, {}, {"dtype": "F32"}, {**entry(), "strides": [1]}])
def test_badly_described_tensor(tmp_path, value):
    malformed(tmp_path, tensors(bias=value), "badly described")


def test_file_over_cap(tmp_path):
    path = tmp_path / "p.safetensors"
    with path.open("wb") as handle:
        handle.truncate(patch_file.MAX_FILE_BYTES + 1)  # sparse: takes no room
    with pytest.raises(PatchFormatError, match="too large for a patch"):
        Patch.load(path)


def test_refused_by_the_library(tmp_path, monkeypatch):
    def refuse(_):
        raise safetensors.SafetensorError("no")

    monkeypatch.setattr(safetensors, "deserialize", refuse)
    malformed(tmp_path, tensors(), "the safetensors library refuses the file; got no")


def test_half_a_surrogate_in_a_name(tmp_path):
    header = {"__metadata__": METADATA, "\ud800": entry()}
    malformed(tmp_path, container(header, bytes(8)), "the safetensors library refuses")


# -- PatchFormatError: not a file ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.safetensors", "file/p.safetensors", "a\0b", "x" * 300, "loop", "socket"])
def test_no_such_file(tmp_path, name, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)  # the path of a socket is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(PatchFormatError, match=r"there is no such file|the path is not valid") as caught:
            Patch.load(tmp_path / name)
    assert caught.value.field and caught.value.fix == "check the path"


def test_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(PatchFormatError, match="not a regular file; got p"):
        Patch.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/"])
def test_device_or_folder(path):
    with pytest.raises(PatchFormatError, match="not a regular file"):
        Patch.load(path)


def test_symlink_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(tensors())
    (tmp_path / "p.safetensors").symlink_to("blob")
    assert Patch.load(tmp_path / "p.safetensors").name == "pirate"


def test_no_permission_is_the_systems_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        Patch.load(tmp_path / "p.safetensors")


# -- PatchFormatError: unsafe formats --------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".zip", ".PT"])
def test_unsafe_suffix(tmp_path, suffix):
    # Refused by name even if the content is good, and even if there is no such file.
    refused(tmp_path, tensors(), PatchFormatError, f"unsafe format.*got a {suffix} file", f"p{suffix}")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [Bomb(), list(range(300)), None], ids=["bomb", "list", "none"])
def test_pickle_content(tmp_path, protocol, value):
    malformed(tmp_path, pickle.dumps(value, protocol), "unsafe format.*got pickle content")


def test_zip_content(tmp_path):
    malformed(tmp_path, zipped(), "unsafe format.*zip, .pt or .npz content")


@pytest.mark.parametrize("mtime", [0, 1_700_000_000])
def test_gzip_content(tmp_path, mtime):
    malformed(tmp_path, gzip.compress(tensors() * 3, mtime=mtime), "unsafe format.*gzip content")


def test_npz_and_npy_content(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    malformed(tmp_path, buffer.getvalue(), "unsafe format")
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    malformed(tmp_path, buffer.getvalue(), "unsafe format")


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50, 0x8B1F])
def test_header_length_that_looks_like_another_format(tmp_path, length):
    # 0x80 0x02 starts a pickle, "PK" a zip, 0x1f 0x8b a gzip, and each is also a fine header length.
    config = {key: value for key, value in json.loads(CONFIG).items() if not isinstance(value, dict)}
    header = {"__metadata__": {**METADATA, "config": json.dumps(config)}, BIAS: entry()}
    text = json.dumps(header, separators=(",", ":")).encode()
    path = tmp_path / "p.safetensors"
    path.write_bytes(container(text.ljust(length), bytes(8)))
    assert Patch.load(path).name == "pirate"

"""The container of tensors, which the safetensors library reads too; runtime/patch has a test for each damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from tp_runtime.errors import OutputError
from tp_runtime.storage import (
    Kind,
    SafetensorsError,
    parse_safetensors,
    safetensors_header,
    safetensors_metadata,
    write_safetensors,
)

ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1}
ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    "a": np.arange(5, dtype=np.int8),
    "c": np.arange(4, dtype=np.float16).reshape(2, 2),
    "none": np.zeros((0, 3), np.float32),
}
DTYPES = {"b": "F32", "a": "I8", "c": "F16", "none": "F32"}
MINE = Kind("a file of this test", lambda file: None if safetensors_metadata(file) == {"format": "t"} else "another")


def write(file: Path) -> None:
    described = {name: (DTYPES[name], array.shape, array.itemsize) for name, array in ARRAYS.items()}
    header, order, size = safetensors_header({"format": "t"}, described)
    assert size == sum(array.nbytes for array in ARRAYS.values()) and len(header) % 8 == 0
    write_safetensors(file, header, [ARRAYS[name].tobytes() for name in order], MINE)


def test_the_library_reads_what_is_written_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors")
    write(tmp_path / "t.safetensors")  # a file of the same kind is replaced
    raw = (tmp_path / "t.safetensors").read_bytes()
    found = load(raw)
    assert found.keys() == ARRAYS.keys() and all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    for name, place in parse_safetensors(raw, ITEM_BYTES)[1].items():
        assert place.begin % ARRAYS[name].itemsize == 0
    (tmp_path / "x.safetensors").write_bytes(save({"b": ARRAYS["b"]}))
    with pytest.raises(OutputError, match="a file of this test to replace"):
        write(tmp_path / "x.safetensors")


def test_what_the_library_writes_is_read() -> None:
    raw = save(ARRAYS, metadata={"format": "t"})
    metadata, places = parse_safetensors(raw, ITEM_BYTES)
    assert metadata == {"format": "t"} and places.keys() == ARRAYS.keys()
    for name, (dtype, shape, begin, end) in places.items():
        assert (dtype, shape) == (DTYPES[name], ARRAYS[name].shape)
        assert raw[begin:end] == ARRAYS[name].tobytes()


def test_the_header_alone_is_enough_if_the_size_of_the_file_is_given() -> None:
    raw = save(ARRAYS)
    head = raw[: 8 + int.from_bytes(raw[:8], "little")]
    assert parse_safetensors(head, ITEM_BYTES, len(raw)) == parse_safetensors(raw, ITEM_BYTES)
    for size, problem in ((len(raw) - 1, "truncated"), (len(raw) + 1, "trailing bytes")):
        with pytest.raises(SafetensorsError, match=problem):
            parse_safetensors(head, ITEM_BYTES, size)
    with pytest.raises(SafetensorsError, match="past the end of the file"):
        parse_safetensors(head[:-1], ITEM_BYTES, len(raw))


def test_only_the_callers_dtypes_are_accepted() -> None:
    with pytest.raises(SafetensorsError, match="unsupported dtype") as caught:
        parse_safetensors(save(ARRAYS), {"F32": 4, "I8": 1})
    assert caught.value.dtype and caught.value.wanted == "F32 | I8"

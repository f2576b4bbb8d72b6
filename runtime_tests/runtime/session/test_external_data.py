"""The files that a graph names: every place is found, and a graph that names another file than a listed one is refused.

The graphs are made of bytes in protobuf's wire format. runtime_tests/export/test_external_scan.py compares the scan
with the `onnx` package.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_tests.folders import alter
from tp_runtime.errors import ModelFormatError, UnsafePathError
from tp_runtime.session import Graph, ModelFolder, describe_files, prepare
from tp_runtime.session.description import SLOTS_FILE
from tp_runtime.session.external_data import external_files


def number(value: int) -> bytes:
    """Return a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(index: int, content: bytes) -> bytes:
    """Return a field that holds a string or a message."""
    return number(index << 3 | 2) + number(len(content)) + content


def tensor(location: str) -> bytes:
    return field(8, b"w") + field(13, field(1, b"location") + field(2, location.encode()))


# The way from the model to a tensor, as numbers of fields in onnx.proto, outermost first.
PLACES = {
    "an initializer": (7, 5),
    "the values of a sparse initializer": (7, 15, 1),
    "the indices of a sparse initializer": (7, 15, 2),
    "an attribute": (7, 1, 5, 5),
    "a list in an attribute": (7, 1, 5, 10),
    "a sparse attribute": (7, 1, 5, 22, 1),
    "a list of sparse tensors in an attribute": (7, 1, 5, 23, 2),
    "a subgraph": (7, 1, 5, 6, 5),
    "a list of subgraphs": (7, 1, 5, 11, 5),
    "a subgraph of a subgraph": (7, 1, 5, 6, 1, 5, 6, 15, 1),
    "a function": (25, 7, 5, 5),
    "a subgraph in a function": (25, 7, 5, 6, 5),
    "the default of a function's attribute": (25, 11, 5),
    "a training graph": (20, 1, 5),
    "the algorithm of a training graph": (20, 2, 5),
}


def wrap(way: tuple[int, ...], content: bytes) -> bytes:
    for index in reversed(way):
        content = field(index, content)
    return content


@pytest.mark.parametrize("way", PLACES.values(), ids=PLACES)
def test_a_name_is_found_in_every_place_that_has_tensors(way: tuple[int, ...]) -> None:
    graph = field(8, b"opset") + wrap(way, tensor("evil"))
    assert external_files(graph, "model.onnx") == {"evil"}


ENTRIES = {
    "the value before the key": field(2, b"evil") + field(1, b"location"),
    "the key twice": field(1, b"x") + field(1, b"location") + field(2, b"evil"),
    "the value twice": field(1, b"location") + field(2, b"model.onnx_data") + field(2, b"evil"),
    "an unknown field": field(1, b"location") + field(9, b"\x6a\x02") + field(2, b"evil"),
    "a number in between": field(1, b"location") + b"\x18\x01" + field(2, b"evil"),
    "numbers of fixed size": b"\x19" + bytes(8) + field(1, b"location") + b"\x1d" + bytes(4) + field(2, b"evil"),
    "long numbers": b"\x8a\x00\x88\x80\x00location" + field(2, b"evil"),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_is_read_as_protobuf_reads_it(entry: bytes) -> None:
    assert external_files(wrap((7, 5, 13), entry), "model.onnx") == {"evil"}


def test_a_graph_in_two_parts_is_read_whole() -> None:
    graph = wrap((7, 5), tensor("first")) + wrap((7, 5), tensor("second"))
    assert external_files(graph, "model.onnx") == {"first", "second"}


def test_another_key_and_another_field_name_no_file() -> None:
    other = field(13, field(1, b"offset") + field(2, b"location")) + field(12, b"location")
    assert external_files(wrap((7, 5), other) + field(2, b"location"), "model.onnx") == frozenset()


def malformed() -> Iterator[tuple[str, bytes]]:
    inner = wrap((7, 5), tensor("evil"))
    yield "cut off", inner[:-1]
    yield "a size past the end", b"\x3a\x7f" + inner
    yield "a number without an end", b"\xff" * 4
    yield "a size that is too long", b"\x3a" + b"\x80" * 5 + b"\x01"
    yield "a tag that is too long", b"\xba\x80\x80\x80\x80\x00" + inner
    yield "a tag of more than 32 bits", b"\xba\x80\x80\x80\x10" + number(len(inner)) + inner
    yield "a group", b"\x3b" + inner + b"\x3c"
    yield "an unknown wire type", b"\x3e" + inner
    yield "the field 0", field(0, inner)
    yield "a fixed number past the end", b"\x09" + bytes(7)
    yield "a name that is not UTF-8", wrap((7, 5, 13), field(1, b"location") + field(2, b"\xff"))
    yield "subgraphs without end", wrap((7, *(1, 5, 6) * 99, 5), tensor("evil"))


@pytest.mark.parametrize("graph", [graph for _, graph in malformed()], ids=[name for name, _ in malformed()])
def test_bytes_that_readers_could_take_differently_are_refused(graph: bytes) -> None:
    with pytest.raises(ModelFormatError, match="not a well-formed ONNX graph"):
        external_files(graph, "model.onnx")


# -- in a folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_llama_export: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_export, tmp_path / "m")


def relist(folder: Path) -> ModelFolder:
    """List the changed graph in the description, as its author can, and open the folder."""
    record = describe_files(folder, ["model.onnx"])["model.onnx"]
    alter(folder, lambda data: data["files"].update({"model.onnx": {"sha256": record.sha256, "bytes": record.bytes}}))
    return ModelFolder.open(folder, verify=True)


NAMES = ["other.onnx_data", "../m/model.onnx_data", "/etc/passwd", "..", "", "a/b", "C:x", "*/_ORT_MEM_ADDR_/*"]


@pytest.mark.parametrize("name", [*NAMES, SLOTS_FILE])
@pytest.mark.parametrize("place", ["an initializer", "a subgraph", "an attribute"])
def test_a_graph_that_names_a_file_that_is_not_listed_opens_no_session(folder: Path, name: str, place: str) -> None:
    (folder / "other.onnx_data").write_bytes(bytes(2**20))
    with (folder / "model.onnx").open("ab") as file:
        file.write(wrap(PLACES[place], tensor(name)))
    opened = relist(folder)
    with pytest.raises(UnsafePathError, match="external data of model"):
        Graph(opened, "cpu")
    with pytest.raises(UnsafePathError, match="external data of model"):
        prepare(opened)


def test_a_data_file_that_is_taken_off_the_list_is_not_read(folder: Path) -> None:
    alter(folder, lambda data: data["files"].pop("model.onnx_data"))
    with pytest.raises(UnsafePathError, match=r"model\.onnx_data"):
        Graph(ModelFolder.open(folder, verify=True), "cpu")

"""The names of the files that an ONNX graph refers to, found without the `onnx` package.

ONNX Runtime opens every file that the graph names as external data. This module finds all those names in the graph's
bytes before ONNX Runtime sees them. It reads protobuf's wire format: a message is a list of fields, and each has a
number, a wire type and a value. Only fields that can lead to external data are followed, in every place where ONNX has
tensors: subgraphs, functions, attributes, sparse initializers and training graphs. Where readers of protobuf differ,
for example on a number that is too long, the graph is refused.
"""

from __future__ import annotations

from ..errors import ModelFormatError, UnsafePathError
from ..storage import REEXPORT, check_name

# For each kind of message the fields that can lead to external data, by number, with the kind of message in them. The
# numbers are those of onnx.proto. A field that occurs twice is followed twice, as protobuf merges the two.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # the fields of an entry
_LOCATION = b"location"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT, _LONGEST_SIZE = 10, 5  # in bytes
_DEEPEST = 100  # protobuf's own limit on messages in messages


def external_files(graph: bytes, field: str) -> frozenset[str]:
    """Return the names of all files that a graph refers to as external data.

    Args:
        graph: the bytes of the ONNX file.
        field: the name of the ONNX file, for errors.

    Raises:
        ModelFormatError: the bytes are not an ONNX graph.
    """
    found: set[bytes] = set()
    try:
        _scan(graph, 0, len(graph), "model", found, 0)
        return frozenset(name.decode("utf-8") for name in found)
    except (_Malformed, UnicodeDecodeError) as error:
        raise ModelFormatError(
            "the file is not a well-formed ONNX graph", field=field, got=error, wanted="a graph", fix=REEXPORT
        ) from None


def check_external_files(graph: bytes, listed: frozenset[str], field: str) -> frozenset[str]:
    """Check that every file that a graph refers to is a listed one, and return their names.

    Args:
        graph: the bytes of the ONNX file.
        listed: the names of the files that were checked.
        field: the name of the ONNX file, for errors.

    Raises:
        ModelFormatError: the bytes are not an ONNX graph.
        UnsafePathError: the graph refers to a file with an unsafe name, or to a file that is not listed.
    """
    names = external_files(graph, field)
    for name in sorted(names):
        check_name(name, f"external data of {field}")
        if name not in listed:
            raise UnsafePathError(
                "the graph has tensors in a file that the folder does not list",
                field=f"external data of {field}",
                got=ascii(name),
                wanted="one of " + ", ".join(sorted(listed)),
                fix="do not use this folder unless you trust its source; export the model again with tp-export",
            )
    return names


class _Malformed(Exception):
    """The bytes are not a protobuf message, or readers could take them for different messages."""


def _scan(raw: bytes, start: int, end: int, kind: str, found: set[bytes], depth: int) -> None:
    """Add to `found` the locations in the message of some kind at raw[start:end]."""
    if depth > _DEEPEST:
        raise _Malformed("messages are nested too deep")
    followed = _FIELDS[kind]
    position = start
    while position < end:
        number, value, position = _next(raw, position, end)
        inner = followed.get(number)
        # The key of an entry is in one piece, so a message without its text has no entry.
        if inner is None or value is None or raw.find(_LOCATION, value, position) < 0:
            continue
        if inner == "entry":
            _scan_entry(raw, value, position, found)
        else:
            _scan(raw, value, position, inner, found, depth + 1)


def _scan_entry(raw: bytes, start: int, end: int, found: set[bytes]) -> None:
    """Add the value of an entry of external data if its key is the location. Of equal fields the last one counts."""
    strings = {_KEY: b"", _VALUE: b""}
    position = start
    while position < end:
        number, value, position = _next(raw, position, end)
        if number in strings and value is not None:
            strings[number] = raw[value:position]
    if strings[_KEY] == _LOCATION:
        found.add(strings[_VALUE])


def _next(raw: bytes, position: int, end: int) -> tuple[int, int | None, int]:
    """Read one field; return its number, the start of its value if it is a string or message, and its end."""
    tag, position = _number(raw, position, end, _LONGEST_SIZE)
    number, wire = tag >> 3, tag & 7
    if number == 0 or tag >= 1 << 32:
        raise _Malformed("a field's number is not valid")
    if wire == _BYTES:
        size, value = _number(raw, position, end, _LONGEST_SIZE)
        if size > end - value:
            raise _Malformed("a field goes past the end of its message")
        return number, value, value + size
    if wire == _VARINT:
        return number, None, _number(raw, position, end, _LONGEST_VARINT)[1]
    if wire not in _FIXED:
        raise _Malformed(f"a field has the wire type {wire}")
    if _FIXED[wire] > end - position:
        raise _Malformed("a field goes past the end of its message")
    return number, None, position + _FIXED[wire]


def _number(raw: bytes, position: int, end: int, longest: int) -> tuple[int, int]:
    """Read a varint of at most `longest` bytes; return it and its end."""
    result = 0
    for index in range(longest):
        if position + index >= end:
            raise _Malformed("a number goes past the end of its message")
        byte = raw[position + index]
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return result, position + index + 1
    raise _Malformed("a number is too long")

"""The edge's scan for external data finds what the `onnx` package finds, also in graphs with damaged bytes."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from runtime_tests.committed import FIXTURES
from tp_runtime.errors import ModelFormatError
from tp_runtime.session.external_data import external_files

GRAPHS = sorted(FIXTURES.glob("*/model.onnx"))


def locations(model: onnx.ModelProto) -> set[str]:
    """Return every location in the model, found by a walk over all its messages."""
    found, pending = set(), [model]
    while pending:
        message = pending.pop()
        if isinstance(message, TensorProto):
            found.update(entry.value for entry in message.external_data if entry.key == "location")
        for descriptor, value in message.ListFields():
            if descriptor.message_type is not None:
                pending.extend(value if descriptor.is_repeated else [value])
    return found


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.parent.name)
def test_the_scan_finds_the_data_files_of_an_export(path: Path) -> None:
    assert external_files(path.read_bytes(), "model.onnx") == locations(onnx.load(path, load_external_data=False))


def external(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def everywhere() -> onnx.ModelProto:
    """Return a model with external data in every place that can hold a tensor."""
    names = iter(f"file{index}" for index in range(100))

    def sparse() -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=external(next(names)), indices=external(next(names)), dims=[1])

    def graph(depth: int) -> onnx.GraphProto:
        node = onnx.NodeProto(op_type="If", name="location")
        for kind, value in (("t", external(next(names))), ("sparse_tensor", sparse())):
            getattr(node.attribute.add(name=kind), kind).CopyFrom(value)
        for kind, value in (("tensors", external(next(names))), ("sparse_tensors", sparse())):
            getattr(node.attribute.add(name=kind), kind).append(value)
        if depth:
            node.attribute.add(name="g").g.CopyFrom(graph(depth - 1))
            node.attribute.add(name="graphs").graphs.append(graph(depth - 1))
        made = helper.make_graph([node], "g", [], [], [external(next(names))])
        made.sparse_initializer.append(sparse())
        return made

    model = helper.make_model(graph(2))
    function = model.functions.add(name="f", domain="d")
    function.node.append(graph(0).node[0])
    function.attribute_proto.add(name="a").t.CopyFrom(external(next(names)))
    training = model.training_info.add()
    training.initialization.CopyFrom(graph(0))
    training.algorithm.CopyFrom(graph(0))
    return model


def test_the_scan_finds_external_data_in_every_place() -> None:
    model = everywhere()
    assert len(locations(model)) == 88
    assert external_files(model.SerializeToString(), "model.onnx") == locations(model)


def test_a_damaged_graph_is_refused_or_read_as_protobuf_reads_it() -> None:
    """No change of a few bytes hides a file from the scan."""
    raw, generator, accepted = everywhere().SerializeToString(), random.Random(0), 0
    for _ in range(4000):
        changed = bytearray(raw)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(len(changed))
            if generator.random() < 0.7:
                changed[place] = generator.randrange(256)
            elif generator.random() < 0.5:
                del changed[place]
            else:
                changed.insert(place, generator.randrange(256))
        try:
            wanted = locations(onnx.ModelProto.FromString(bytes(changed)))
        except (DecodeError, UnicodeDecodeError):
            continue  # ONNX Runtime refuses it too
        try:
            found = external_files(bytes(changed), "model.onnx")
        except ModelFormatError:
            continue
        accepted += 1
        assert wanted <= found
    assert accepted > 500

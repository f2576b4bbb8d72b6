"""Targets of reshapes become constants, and the reshapes do what they did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tp_export.graph.edit import add_initializer
from tp_export.graph.shapes import state_shapes


def model(out: list[int | str | None]) -> ir.Model:
    """Return a graph that splits [rows, steps, 12] into heads of 4, with a target that it computes as a tracer does."""
    given = ir.Value(name="given", shape=ir.Shape(["rows", "steps", 12]), type=ir.TensorType(ir.DataType.FLOAT))
    result = ir.Model(ir.Graph([given], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    sizes = ir.node("Shape", [given], {"start": 0, "end": 2})
    rest = add_initializer(result, "rest", np.array([-1, 4], np.int64))
    target = ir.node("Concat", [sizes.outputs[0], rest], {"axis": 0})
    reshape = ir.node("Reshape", [given, target.outputs[0]], {"allowzero": 1})
    for node in (sizes, target, reshape):
        result.graph.append(node)
    heads = reshape.outputs[0]
    heads.name, heads.shape, heads.dtype = "heads", ir.Shape(out), ir.DataType.FLOAT
    result.graph.outputs.append(heads)
    return result


def run(graph: ir.Model, given: np.ndarray) -> np.ndarray:
    content = ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"given": given})[0])


@pytest.mark.parametrize("heads", [3, None])
def test_a_target_that_copies_dimensions_becomes_a_constant(heads: int | None) -> None:
    graph = model(["rows", "steps", heads, 4])
    state_shapes(graph)
    RemoveUnusedNodesPass()(graph)
    assert [node.op_type for node in graph.graph] == ["Reshape"]
    given = np.arange(2 * 5 * 12, dtype=np.float32).reshape(2, 5, 12)
    assert np.array_equal(run(graph, given), given.reshape(2, 5, 3, 4))


def test_a_target_with_two_unknown_dimensions_stays() -> None:
    graph = model(["rows", None, None, 4])
    state_shapes(graph)
    assert [node.op_type for node in graph.graph] == ["Shape", "Concat", "Reshape"]

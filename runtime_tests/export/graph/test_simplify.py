"""Simplified graphs compute what they computed before, with fewer operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tp_export.graph.simplify import simplify

WIDTH = 16


def graph_of(nodes: Sequence[onnx.NodeProto], shapes: dict[str, list[str | int]], out: str) -> onnx.ModelProto:
    """Return a graph of `nodes` from the input `x` [B, T, WIDTH] to `out`; `scale_N` are scales of N numbers."""
    wanted = {int(name.split("_")[1]) for node in nodes for name in node.input if name.startswith("scale_")}
    rng = np.random.default_rng(0)
    initializers = [
        numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), f"scale_{size}") for size in wanted
    ]
    reshapes = {name: np.array([int(n) for n in name.split("_")[1:]]) for node in nodes for name in node.input[1:2]}
    initializers += [numpy_helper.from_array(v, name) for name, v in reshapes.items() if name.startswith("to_")]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    inner = [value for name, value in values.items() if name not in ("x", out)]
    graph = helper.make_graph(nodes, "test", [values["x"]], [values[out]], initializers, value_info=inner)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def logits(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.serde.deserialize_model(model)
    simplify(graph)
    return ir.serde.serialize_model(graph)


@pytest.mark.parametrize(("heads", "reshapes"), [(1, 0), (2, 2)])
def test_the_norm_of_a_single_head_needs_no_reshapes(heads: int, reshapes: int) -> None:
    size = WIDTH // heads
    whole, split = ["B", "T", WIDTH], ["B", "T", heads, size]
    model = graph_of(
        [
            helper.make_node("Reshape", ["x", f"to_0_0_{heads}_{size}"], ["split"], "split"),
            helper.make_node(
                "SimplifiedLayerNormalization", ["split", f"scale_{size}"], ["n"], "norm", axis=-1, epsilon=1e-6
            ),
            helper.make_node("Reshape", ["n", f"to_0_0_{WIDTH}"], ["joined"], "join"),
            helper.make_node("Neg", ["joined"], ["out"], "out"),
        ],
        {"x": whole, "split": split, "n": split, "joined": whole, "out": whole},
        "out",
    )
    wanted, got = logits(model), simplified(model)
    assert sum(node.op_type == "Reshape" for node in got.graph.node) == reshapes
    np.testing.assert_allclose(logits(got), wanted, atol=1e-6)


def test_a_fused_norm_returns_nothing_that_nobody_reads() -> None:
    whole = ["B", "T", WIDTH]
    norm = "SkipSimplifiedLayerNormalization"
    model = graph_of(
        [
            helper.make_node(norm, ["x", "x", f"scale_{WIDTH}"], ["n", "mean", "std", "sum"], "1", "", "com.microsoft"),
            helper.make_node(norm, ["n", "sum", f"scale_{WIDTH}"], ["out", "m", "s", "t"], "2", "", "com.microsoft"),
        ],
        {"x": whole, "n": whole, "sum": whole, "out": whole},
        "out",
    )
    wanted, got = logits(model), simplified(model)
    first, second = got.graph.node
    assert [name for name in first.output if name] == [first.output[0], first.output[3]]
    assert [name for name in second.output if name] == [second.output[0]]
    np.testing.assert_array_equal(logits(got), wanted)

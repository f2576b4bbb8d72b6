"""What is left of a traced graph's overhead once its operators are fused.

A decode step of a small model spends microseconds in each operator, so an operator that only moves shapes about costs
as much as one that computes. Reshapes that undo each other go (queries split into heads, and joined again for the
attention operator), and products of one input are joined (onnx_products.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .onnx_edit import replace_node
from .onnx_products import join_products


def simplify(model: ir.Model, apart: Collection[str] = ()) -> None:
    """Remove reshapes that undo each other, and join what is computed from one value; in place.

    Args:
        model: the traced graph, its weights named.
        apart: names of weights that are joined with no others.
    """
    for node in list(model.graph):
        _multiply_unflattened(model, node)
    _norm_before_transposing(model)
    _drop_reshapes(model)
    RemoveUnusedNodesPass()(model)  # before anybody asks who else reads a value
    join_products(model, apart)
    for node in list(model.graph):
        _add_slot_at_once(model, node)
    RemoveUnusedNodesPass()(model)


def _multiply_unflattened(model: ir.Model, node: ir.Node) -> None:
    """x W + b of x [B, T, K] where it was flattened to [B T, K] for a Gemm (GPT-2): the other passes know no Gemm."""
    plain = node.op_type == "Gemm" and all(
        attribute.as_float() == 1 if name in ("alpha", "beta") else not attribute.as_int()
        for name, attribute in node.attributes.items()
    )
    flattened = node.inputs[0].producer() if plain and node.inputs[0] is not None else None
    readers = [use.node for use in node.outputs[0].uses()]
    if flattened is None or any(reader.op_type != "Reshape" for reader in [flattened, *readers]) or len(readers) != 1:
        return
    source, out = flattened.inputs[0], readers[0].outputs[0]
    if source is None or source.shape is None or out.shape is None or len(source.shape) != len(out.shape):
        return
    if not _same_dimensions(source.shape[:-1], out.shape[:-1]):
        return
    steps = [ir.node("MatMul", [source, node.inputs[1]], name=node.name)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        steps.append(ir.node("Add", [steps[0].outputs[0], node.inputs[2]], name=f"{node.name}.bias"))
    for step in steps:
        step.outputs[0].type, step.outputs[0].shape = out.type, out.shape
    model.graph.insert_before(node, steps)
    name = out.name
    ir.convenience.replace_all_uses_with(out, steps[-1].outputs[0])
    model.graph.remove([readers[0], node], safe=True)
    steps[-1].outputs[0].name = name


def _norm_before_transposing(model: ir.Model) -> None:
    """Drop the transposes around a norm of each head (Qwen 3, Gemma 3): it reads the last dimension, which stays."""
    for node in model.graph:
        if node.op_type != "Transpose" or node.inputs[0] is None:
            continue
        norm = node.inputs[0].producer()
        if norm is None or norm.op_type != "SimplifiedLayerNormalization" or not _alone(norm):
            continue
        first = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if first is None or first.op_type != "Transpose":
            continue
        there, back = (list(t.attributes["perm"].as_ints()) for t in (first, node))
        last = len(there) - 1
        if [there[i] for i in back] == list(range(len(there))) and there[last] == last:
            norm.replace_input_with(0, first.inputs[0])
            norm.outputs[0].shape = node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], norm.outputs[0])


def _drop_reshapes(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        origin = node.inputs[0]
        while (
            (before := origin.producer()) is not None and before.op_type == "Reshape" and before.inputs[0] is not None
        ):
            origin = before.inputs[0]
        if _same_shape(origin, node.outputs[0]) and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], origin)
        elif not _takes_from_input(node):
            node.replace_input_with(0, origin)


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    return _same_dimensions(one.shape.dims, other.shape.dims)


def _same_dimensions(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(
        a == b and not (isinstance(a, ir.SymbolicDim) and a.value is None) for a, b in zip(one, other, strict=True)
    )


def _takes_from_input(node: ir.Node) -> bool:
    """Whether a 0 in the wanted shape copies a dimension of what is reshaped, so that it must stay what it is."""
    wanted = node.inputs[1].const_value if node.inputs[1] is not None else None
    return wanted is None or bool((wanted.numpy() == 0).any())


def _add_slot_at_once(model: ir.Model, node: ir.Node) -> None:
    """out + (pair + bias) of a slot as one Sum: unpatched, all that slots cost is the calls of their operators."""
    if node.op_type != "Add":
        return
    for out, slot in (node.inputs, node.inputs[::-1]):
        inner = slot.producer() if slot is not None else None
        if inner is None or inner.op_type != "Add" or not _alone(inner):
            continue
        if any(value is not None and value.is_graph_input() for value in inner.inputs):  # only slots have biases there
            replace_node(model, node, ir.node("Sum", [out, *inner.inputs], name=node.name))
            return


def _alone(node: ir.Node) -> bool:
    return len(node.outputs[0].uses()) == 1

"""What is left of a traced graph's overhead once its operators are fused.

A decode step of a small model spends microseconds in each operator, so an operator that only moves shapes about costs
as much as one that computes. Reshapes that undo each other go (queries split into heads, and joined again for the
attention operator), and where queries, keys and values come from three products of one input, one product of the three
weights side by side takes their place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .onnx_edit import add_initializer, replace_node


def simplify(model: ir.Model) -> None:
    """Remove reshapes that undo each other, and join the products in front of each attention; in place."""
    _norm_before_transposing(model)
    _drop_reshapes(model)
    RemoveUnusedNodesPass()(model)  # before anybody asks who else reads a value
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            _pack_projections(model, node)
    for node in list(model.graph):
        _add_slot_at_once(model, node)
    RemoveUnusedNodesPass()(model)


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
    return all(
        a == b and not (isinstance(a, ir.SymbolicDim) and a.value is None)
        for a, b in zip(one.shape, other.shape, strict=True)
    )


def _takes_from_input(node: ir.Node) -> bool:
    """Whether a 0 in the wanted shape copies a dimension of what is reshaped, so that it must stay what it is."""
    wanted = node.inputs[1].const_value if node.inputs[1] is not None else None
    return wanted is None or bool((wanted.numpy() == 0).any())


def _pack_projections(model: ir.Model, attention: ir.Node) -> None:
    """One product for queries, keys and values; biases of all three come along, anything else between stays."""
    parts = [_projection(value) for value in attention.inputs[:3]]
    if any(part is None for part in parts) or len({id(part[0]) for part in parts if part}) != 1:
        return
    found = [part for part in parts if part is not None]
    biased = [bias is not None for _source, _weight, bias in found]
    if any(biased) != all(biased):
        return
    source, first = found[0][0], found[0][1]
    name = (
        (first.name or "").replace("q_proj", "qkv_proj") if "q_proj" in (first.name or "") else f"{attention.name}.qkv"
    )
    packed = ir.node(
        "MatMul", [source, _joined(model, [weight for _s, weight, _b in found], name)], name=f"{name}.MatMul"
    )
    steps = [packed]
    if all(biased):
        joined = _joined(
            model, [bias for _s, _w, bias in found if bias is not None], f"{name.removesuffix('.weight')}.bias"
        )
        steps.append(ir.node("Add", [packed.outputs[0], joined], name=f"{name}.Add"))
    query = attention.inputs[0]
    assert query is not None and query.shape is not None
    width = sum(weight.const_value.shape.numpy()[1] for _s, weight, _b in found if weight.const_value is not None)
    for step in steps:
        step.outputs[0].type = query.type
        step.outputs[0].shape = ir.Shape([*query.shape[:2], width])
    model.graph.insert_before(attention, steps)
    attention.replace_input_with(0, steps[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


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


def _projection(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """What `value` is the product of, (source, weight, bias), if nobody else reads it."""
    bias = None
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Add" and _alone(node):
        sides = [i for i in (0, 1) if _is_weight(node.inputs[i], 1)]
        if len(sides) != 1:
            return None
        bias = node.inputs[sides[0]]
        product = node.inputs[1 - sides[0]]
        node = product.producer() if product is not None else None
    if node is None or node.op_type != "MatMul" or not _alone(node) or not _is_weight(node.inputs[1], 2):
        return None
    source, weight = node.inputs
    assert source is not None and weight is not None
    return source, weight, bias


def _alone(node: ir.Node) -> bool:
    return len(node.outputs[0].uses()) == 1


def _is_weight(value: ir.Value | None, dimensions: int) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and len(value.const_value.shape) == dimensions
        and len(value.uses()) == 1
    )


def _joined(model: ir.Model, values: list[ir.Value], name: str) -> ir.Value:
    """The values side by side along their last dimension, as one initializer in their place."""
    arrays = [value.const_value.numpy() for value in values if value.const_value is not None]
    for value in values:
        del model.graph.initializers[str(value.name)]
    return add_initializer(model, name, np.concatenate(arrays, axis=-1))

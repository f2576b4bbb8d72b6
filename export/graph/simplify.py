"""Remove the overhead that a traced graph still has after its operators are fused.

A decode step of a small model spends microseconds in each operator, so an operator that only changes shapes costs
about as much as one that computes. This module removes reshapes that undo each other: the model splits queries into
heads, and the attention operator needs them joined again. It also joins products of one input (products.py), states
the targets of the other reshapes (shapes.py), and drops outputs of fused norms that only training reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .edit import is_read_once, is_weight, replace_node
from .products import join_products
from .shapes import state_shapes


def simplify(model: ir.Model) -> None:
    """Remove reshapes and outputs that nobody needs, and join products of one value; changes the graph in place.

    Args:
        model: the traced graph, whose weights have their names.
    """
    for node in list(model.graph):
        _replace_gemm(model, node)
    _norm_before_transposing(model)
    _norm_before_splitting(model)
    _drop_reshapes(model)
    state_shapes(model)
    RemoveUnusedNodesPass()(model)  # the next pass counts the readers of values
    join_products(model)
    for node in list(model.graph):
        _sum_slot(model, node)
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        _drop_statistics(node)


def _replace_gemm(model: ir.Model, node: ir.Node) -> None:
    """Replace a Gemm, which no other pass handles, with a MatMul and an Add; changes the graph in place.

    A Gemm multiplies either an expert's rows [n, K], or GPT-2's [B, T, K] flattened to rows. The MatMul reads [B, T, K]
    directly, so the reshapes around the Gemm are removed.
    """
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    weight = node.inputs[1] if node.op_type == "Gemm" else None
    if weight is None or settings.get("transA") or any(settings.get(name, 1) != 1 for name in ("alpha", "beta")):
        return
    if not is_weight(weight, 2) or node.inputs[0] is None:
        return
    assert weight.const_value is not None
    if settings.get("transB"):
        transposed = np.ascontiguousarray(weight.const_value.numpy().T)
        weight.const_value, weight.shape = ir.tensor(transposed, name=weight.name), ir.Shape(transposed.shape)
    source, out, gone = node.inputs[0], node.outputs[0], [node]
    flattened, readers = source.producer(), [use.node for use in out.uses()]
    if flattened is not None and flattened.op_type == "Reshape" and [r.op_type for r in readers] == ["Reshape"]:
        whole, unflattened = flattened.inputs[0], readers[0].outputs[0]
        inputs, outputs = weight.const_value.shape.numpy()
        if whole is not None and _is_product_of(whole, unflattened, inputs, outputs):
            source, out, gone = whole, unflattened, [readers[0], node]
    steps = [ir.node("MatMul", [source, weight], name=node.name)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        steps.append(ir.node("Add", [steps[0].outputs[0], node.inputs[2]], name=f"{node.name}.bias"))
    for step in steps:
        step.outputs[0].type, step.outputs[0].shape = out.type, out.shape
    model.graph.insert_before(node, steps)
    name = out.name
    ir.convenience.replace_all_uses_with(out, steps[-1].outputs[0])
    model.graph.remove(gone, safe=True)
    steps[-1].outputs[0].name = name


def _is_product_of(source: ir.Value, out: ir.Value, inputs: int, outputs: int) -> bool:
    """Whether `source` is [..., inputs], `out` is [..., outputs], and their leading dimensions are the same."""
    if source.shape is None or out.shape is None or len(source.shape) != len(out.shape):
        return False
    same = _same_dimensions(source.shape[:-1], out.shape[:-1])
    return same and source.shape[-1] == inputs and out.shape[-1] == outputs


def _drop_statistics(node: ir.Node) -> None:
    """Leave out the means and deviations that a fused norm would return, which nobody reads: each costs an allocation.

    Training reads them. An output without a name is left out.
    """
    if node.op_type in ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"):
        for output in node.outputs[1:]:
            if not output.uses() and not output.is_graph_output():
                output.name = ""


def _norms_between(model: ir.Model, op_type: str) -> Iterator[tuple[ir.Node, ir.Node, ir.Node]]:
    """Yield (first, norm, last) for each norm that alone stands between two nodes of a type; callers may drop both."""
    for last in model.graph:
        if last.op_type != op_type or last.inputs[0] is None:
            continue
        norm = last.inputs[0].producer()
        if norm is None or norm.op_type != "SimplifiedLayerNormalization" or not is_read_once(norm):
            continue
        first = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if first is not None and first.op_type == op_type:
            yield first, norm, last


def _norm_before_transposing(model: ir.Model) -> None:
    """Drop the transposes around a per-head norm (Qwen 3, Gemma 3): the norm's last dimension does not move."""
    for first, norm, node in _norms_between(model, "Transpose"):
        there, back = (list(t.attributes["perm"].as_ints()) for t in (first, node))
        last = len(there) - 1
        if [there[i] for i in back] == list(range(len(there))) and there[last] == last:
            norm.replace_input_with(0, first.inputs[0])
            norm.outputs[0].shape = node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], norm.outputs[0])


def _norm_before_splitting(model: ir.Model) -> None:
    """Drop the reshapes around the norm of a single head (Gemma 3's keys): to split one head off changes nothing."""
    for first, norm, node in _norms_between(model, "Reshape"):
        whole, heads = first.inputs[0], first.outputs[0].shape
        if whole is None or heads is None or not _same_shape(whole, node.outputs[0]) or whole.shape is None:
            continue
        if isinstance(heads[-1], int) and whole.shape[-1] == heads[-1] and norm.attributes["axis"].as_int() == -1:
            norm.replace_input_with(0, whole)
            norm.outputs[0].shape = whole.shape
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
    """Whether the target shape may hold a 0, which copies a dimension of the input, so the input must not change."""
    wanted = node.inputs[1].const_value if node.inputs[1] is not None else None
    return wanted is None or bool((wanted.numpy() == 0).any())


def _sum_slot(model: ir.Model, node: ir.Node) -> None:
    """Replace out + (pair + bias) of a slot with one Sum: an unpatched slot costs only the calls of its operators."""
    if node.op_type != "Add":
        return
    for out, slot in (node.inputs, node.inputs[::-1]):
        inner = slot.producer() if slot is not None else None
        if inner is None or inner.op_type != "Add" or not is_read_once(inner):
            continue
        # Only a slot's bias is a graph input.
        if any(value is not None and value.is_graph_input() for value in inner.inputs):
            replace_node(model, node, ir.node("Sum", [out, *inner.inputs], name=node.name))
            return

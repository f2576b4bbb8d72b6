"""Edits that several passes over a graph share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike


def add_initializer(model: ir.Model, name: str, content: ArrayLike) -> ir.Value:
    """Add an initializer with the content's dtype and shape to the graph, and return it."""
    array = np.asarray(content)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def is_weight(value: ir.Value | None, dimensions: int) -> bool:
    """Whether `value` is an initializer with this many dimensions, has one reader, and is not a graph input."""
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and len(value.const_value.shape) == dimensions
        and len(value.uses()) == 1
    )


def is_read_once(node: ir.Node) -> bool:
    """Whether the node's output is read exactly once."""
    return len(node.outputs[0].uses()) == 1


def replace_node(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Replace a node of one output; the new output takes over the old one's name, type, shape and readers."""
    before, after = old.outputs[0], new.outputs[0]
    after.type, after.shape = before.type, before.shape
    model.graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    name = before.name
    model.graph.remove(old, safe=True)
    after.name = name

"""Edits of a graph that every pass over it makes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike


def add_initializer(model: ir.Model, name: str, content: ArrayLike) -> ir.Value:
    """A constant of the graph, with the content's dtype and shape."""
    array = np.asarray(content)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def is_weight(value: ir.Value | None, dimensions: int) -> bool:
    """Whether it is a constant of so many dimensions that one node alone reads, and no input of the graph."""
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and len(value.const_value.shape) == dimensions
        and len(value.uses()) == 1
    )


def is_read_once(node: ir.Node) -> bool:
    """Whether one node alone reads its output."""
    return len(node.outputs[0].uses()) == 1


def replace_node(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Put a node of one output in the place of another: its output's name, type, shape and readers included."""
    before, after = old.outputs[0], new.outputs[0]
    after.type, after.shape = before.type, before.shape
    model.graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    name = before.name
    model.graph.remove(old, safe=True)
    after.name = name

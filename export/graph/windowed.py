"""Give the windowed layers of a graph a cache length of their own.

The attention operators of a traced graph share two values: the length of each row's cache, and the longest of these
lengths. Both come from `attention_mask`. A patch may store other numbers of entries for windowed layers than for full
ones, so a graph with both kinds of layers gets two overridable inputs, which are added to these values in front of the
windowed layers. Their defaults are zero: with nothing bound, the graph computes exactly what it computed before.

The inputs are differences and not lengths, so that other programs, which know neither of them, need not bind them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tp_runtime.errors import ModelFormatError
from tp_runtime.session import WINDOWED_SHIFT, WINDOWED_TOTAL, Windowed

from .edit import add_initializer

_PAST_KEY, _PAST_VALUE, _LENGTHS, _TOTAL = 3, 4, 5, 6  # inputs of the operator
_LENGTH_AXIS = 2  # of keys and values [batch, kv heads, length, head dim]


def separate_windowed(model: ir.Model) -> Windowed | None:
    """Add the inputs `tp.windowed_shift` and `tp.windowed_total`, if the graph has windowed and full layers.

    Args:
        model: a graph of the route `fused`, changed in place.

    Returns:
        The windowed layers; None if the layers are all of one kind, and the graph has not changed.

    Raises:
        ModelFormatError: the windowed layers have different windows.
    """
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    windows = {_layer(node): node.attributes["local_window_size"].as_int() for node in attention if _is_windowed(node)}
    if not 0 < len(windows) < len(attention):
        return None
    if len(set(windows.values())) > 1:
        raise ModelFormatError(
            "the layers have sliding windows of different lengths",
            field="sliding_window",
            got=sorted(set(windows.values())),
            wanted="one length",
            fix="use --route optimum, or --route auto",
        )
    nodes = [node for node in attention if _is_windowed(node)]
    for place, name, rows in ((_LENGTHS, WINDOWED_SHIFT, f"{WINDOWED_SHIFT}.rows"), (_TOTAL, WINDOWED_TOTAL, 1)):
        difference = add_initializer(model, name, np.zeros(1, np.int32))
        difference.shape = ir.Shape([rows])
        model.graph.inputs.append(difference)
        _add_to_all(model, nodes, place, difference)
    for node in nodes:
        _name_lengths(node)
    return Windowed(tuple(sorted(windows)), next(iter(windows.values())))


def _is_windowed(node: ir.Node) -> bool:
    return "local_window_size" in node.attributes and node.attributes["local_window_size"].as_int() > 0


def _layer(node: ir.Node) -> int:
    past = node.inputs[_PAST_KEY]
    assert past is not None and past.name is not None
    return int(past.name.split(".")[1])  # past_key_values.<layer>.key


def _add_to_all(model: ir.Model, nodes: list[ir.Node], place: int, difference: ir.Value) -> None:
    """Add `difference` to the input at `place` of all `nodes`, with one node for each value that they share."""
    sums: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        value = node.inputs[place]
        assert value is not None
        if value not in sums:
            add = ir.node("Add", [value, difference], name=f"{difference.name}.Add")
            add.outputs[0].dtype = ir.DataType.INT32
            model.graph.insert_before(node, add)
            sums[value] = add.outputs[0]
        node.replace_input_with(place, sums[value])


def _name_lengths(node: ir.Node) -> None:
    """Name the lengths of a layer's cache, because ONNX Runtime requires dimensions of one name to be equal."""
    past, present = (node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE]), node.outputs[1:]
    for values, name in ((past, "windowed_past_sequence_length"), (present, "windowed_total_sequence_length")):
        for value in values:
            if value is not None and value.shape is not None:
                sizes: list[int | str | ir.SymbolicDim] = list(value.shape)
                sizes[_LENGTH_AXIS] = name
                value.shape = ir.Shape(sizes)

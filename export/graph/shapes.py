"""State the targets of reshapes as constants.

A traced graph computes the target of a reshape from the shape of an input: with a few nodes on the host, in each step.
Where a dimension is that of the reshaped value, a 0 in the target copies it, and the target is a constant.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .edit import add_initializer


def state_shapes(model: ir.Model) -> None:
    """Give every reshape a constant target whose dimensions are known or copied; changes the graph in place."""
    stated: dict[tuple[int, ...], ir.Value] = {}
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        source, out = node.inputs[0], node.outputs[0]
        target = None if source is None else _target(source.shape, out.shape)
        if target is None:
            continue
        if target not in stated:
            name = "reshape." + ".".join(map(str, target))
            stated[target] = add_initializer(model, name, np.array(target, np.int64))
        node.replace_input_with(1, stated[target])
        node.attributes.pop("allowzero", None)  # with it, a 0 would be a dimension of size 0


def _target(source: ir.Shape | None, out: ir.Shape | None) -> tuple[int, ...] | None:
    """Return a target with 0 where a dimension is copied, and at most one -1; None if that does not state `out`."""
    if source is None or out is None:
        return None
    target = []
    for place, size in enumerate(out):
        if isinstance(size, int):
            target.append(size)
        elif size.value is not None and place < len(source) and source[place] == size:
            target.append(0)
        else:
            target.append(-1)
    return tuple(target) if target.count(-1) < 2 else None

"""Convert an exported graph to half precision.

With fp16 the graph computes in float16: weights, activations, cache and slots. The angles of the rotary embedding stay
in float32 until their cosines and sines are taken, because 16 bits cannot tell position 2049 from 2048.

With bf16 the graph only stores its weights in bfloat16. The file is half as large; the weights become float32 at load,
and the graph computes in float32. ONNX Runtime's CPU kernels do not compute in bf16, so a graph that did would run on
one device only, unlike the graphs of the other precisions.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tp_runtime.errors import ModelFormatError

_LEAST_BYTES = 1024  # smaller tensors keep their dtype and stay in the graph file


def to_fp16(model: ir.Model) -> None:
    """Make `model` compute in float16; changes it in place.

    Raises:
        ModelFormatError: the value of a weight is too large for float16.
    """
    angles = _angle_nodes(model)
    keep = {value for node in angles for value in (*node.inputs, *node.outputs)}
    for value in model.graph.initializers.values():
        if value in keep or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        with np.errstate(over="ignore"):
            array = value.const_value.numpy().astype(np.float16)
        if not np.isfinite(array).all():
            raise ModelFormatError(
                "the weight does not fit float16",
                field=str(value.name),
                got=float(np.abs(value.const_value.numpy()).max()),
                wanted=f"at most {np.finfo(np.float16).max}",
                fix="use --precision bf16 or fp32",
            )
        value.const_value, value.dtype = ir.tensor(array, name=value.name), ir.DataType.FLOAT16
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = ir.DataType.FLOAT16
    for node in list(model.graph):
        if node in angles:
            if node.op_type in ("Cos", "Sin"):
                _cast_output(model, node)
            continue
        cast = node.attributes.get("to")
        if node.op_type == "Cast" and cast is not None and cast.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = ir.DataType.FLOAT16


def _angle_nodes(model: ir.Model) -> set[ir.Node]:
    """Return the nodes that compute cosines and sines, and every node that these depend on."""
    found = {node for node in model.graph if node.op_type in ("Cos", "Sin")}
    pending = list(found)
    while pending:
        for value in pending.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.add(producer)
                pending.append(producer)
    return found


def _cast_output(model: ir.Model, node: ir.Node) -> None:
    out = node.outputs[0]
    cast = ir.node("Cast", [out], {"to": int(ir.DataType.FLOAT16)}, name=f"{node.name}.to_fp16")
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT16, out.shape
    ir.convenience.replace_all_uses_with(out, cast.outputs[0])
    cast.replace_input_with(0, out)
    model.graph.insert_after(node, cast)


def store_in_bf16(model: ir.Model) -> None:
    """Store the weights of `model` in bfloat16 and compute in float32; changes it in place. Slots keep their dtype."""
    first = model.graph[0]
    for value in list(model.graph.initializers.values()):
        stored = value.const_value
        if (
            value.is_graph_input()
            or stored is None
            or stored.dtype != ir.DataType.FLOAT
            or stored.nbytes < _LEAST_BYTES
        ):
            continue
        name = f"{value.name}.bf16"
        array = stored.numpy().astype(ml_dtypes.bfloat16)
        half = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=value.shape)
        half.dtype = ir.DataType.BFLOAT16
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.to_fp32")
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del model.graph.initializers[str(value.name)]
        cast.outputs[0].name = value.name
        model.graph.register_initializer(half)
        model.graph.insert_before(first, cast)

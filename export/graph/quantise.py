"""Quantise the weights of an exported graph in blocks.

Products with a constant weight become `MatMulNBits`, which unpacks one block at a time and, at accuracy level 4,
multiplies in int8. A decode step then reads an eighth to a quarter of the bytes. The lookup of token ids in the
embedding table becomes `GatherBlockQuantized`. If the head is tied to the table, both read the same packed tensor, so
the file stores it once.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ..progress import bar
from ..quantise import BLOCK, Blocks, Precision
from .edit import add_initializer, replace_node

_DOMAIN = "com.microsoft"
_INT8_ACTIVATIONS = 4  # an accuracy level: without it, int4 is no faster than float32 on most CPUs
# A graph that computes in float16 is meant for CUDA, which ignores the level. There the CPU rounds what CUDA rounds.
_OWN_ACTIVATIONS = 0
_PRODUCTS = ("MatMul", "FusedMatMul")
_TRANSPOSED = ("transA", "transBatchA", "transBatchB")  # attributes that MatMulNBits does not have


def quantise(model: ir.Model, precision: Precision, kept: Collection[str]) -> None:
    """Quantise the weights of `model` in place.

    Args:
        model: a graph with its final names and slots.
        precision: the quantiser of the linear layers, and that of the head and the embedding table.
        kept: the names of weights to leave in float32, such as a router's, whose few rows decide between experts.
    """
    head = _head_weight(model)
    packed: dict[str, tuple[ir.Value, ir.Value, ir.Value | None, Blocks]] = {}
    products = [node for node in model.graph if _weight_of(node) is not None]
    with bar("quantise", len(products), "weight") as shown:
        for node in products:
            shown.update()
            weight = _weight_of(node)
            assert weight is not None and weight.const_value is not None and weight.name is not None
            if weight.name in kept:
                continue
            if weight.name not in packed:
                array = weight.const_value.numpy()
                blocks = precision.quantise(array.T if _transposed(node) else array, is_head=weight is head)
                packed[weight.name] = (*_initializers(model, weight.name, blocks), blocks)
            level = _OWN_ACTIVATIONS if precision.half else _INT8_ACTIVATIONS
            _replace_product(model, node, packed[weight.name], level)
    for node in list(model.graph):
        if node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            table = node.inputs[0]
            assert table is not None and table.name is not None and table.const_value is not None
            if table.const_value.shape.numpy()[1] % BLOCK:  # a row would end within a block
                continue
            if table.name not in packed:
                blocks = precision.quantise(np.ascontiguousarray(table.const_value.numpy().T), is_head=True)
                packed[table.name] = (*_initializers(model, table.name, blocks), blocks)
            _replace_lookup(model, node, packed[table.name])
    for name in packed:
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    model.opset_imports[_DOMAIN] = 1


def _weight_of(node: ir.Node) -> ir.Value | None:
    """Return the constant matrix that a product multiplies by; None for any other node, slots included."""
    if node.op_type not in _PRODUCTS or node.inputs[1] is None:
        return None
    weight = node.inputs[1]
    transposed = any(a.as_int() for name in _TRANSPOSED if (a := node.attributes.get(name)) is not None)
    fits = not transposed and weight.is_initializer() and not weight.is_graph_input() and weight.const_value is not None
    return weight if fits and weight.const_value is not None and len(weight.const_value.shape) == 2 else None


def _transposed(node: ir.Node) -> bool:
    attribute = node.attributes.get("transB")
    return attribute is not None and bool(attribute.as_int())


def _head_weight(model: ir.Model) -> ir.Value | None:
    """Return the weight of the last product, which is the head's."""
    return next((w for node in reversed(model.graph) if (w := _weight_of(node)) is not None), None)


def _initializers(model: ir.Model, name: str, blocks: Blocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    zeros = None if blocks.zero_points is None else add_initializer(model, f"{name}.zero_points", blocks.zero_points)
    return (
        add_initializer(model, f"{name}.packed", blocks.packed),
        add_initializer(model, f"{name}.scales", blocks.scales),
        zeros,
    )


def _replace_product(
    model: ir.Model, node: ir.Node, parts: tuple[ir.Value, ir.Value, ir.Value | None, Blocks], accuracy_level: int
) -> None:
    packed, scales, zeros, blocks = parts
    attributes = {"K": blocks.inputs, "N": blocks.scales.shape[0], "accuracy_level": accuracy_level}
    inputs = [node.inputs[0], packed, scales, *([] if zeros is None else [zeros])]
    attributes |= {"bits": blocks.bits, "block_size": BLOCK}
    product = ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, name=node.name)
    scale = node.attributes.get("alpha")  # a soft cap of the logits is folded into the head (Gemma 2)
    if scale is None or scale.as_float() == 1:
        replace_node(model, node, product)
        return
    model.graph.insert_before(node, product)
    factor = add_initializer(model, f"{node.name}.alpha", np.array(scale.as_float(), np.float32))
    replace_node(model, node, ir.node("Mul", [product.outputs[0], factor], name=f"{node.name}.scaled"))


def _replace_lookup(model: ir.Model, node: ir.Node, parts: tuple[ir.Value, ir.Value, ir.Value | None, Blocks]) -> None:
    """Look up rows of [tokens, blocks, BLOCK] and flatten them, so that the packed tensor keeps the head's form."""
    packed, scales, zeros, blocks = parts
    assert zeros is None and node.outputs[0].shape is not None
    tokens, per_token = blocks.scales.shape
    name = str(packed.name).removesuffix(".packed")
    steps = [
        ir.node("Reshape", [scales, add_initializer(model, f"{name}.scales.shape", np.array([tokens, per_token, 1]))]),
    ]
    attributes = {"gather_axis": 0, "quantize_axis": 2, "bits": blocks.bits, "block_size": BLOCK}
    steps.append(
        ir.node("GatherBlockQuantized", [packed, node.inputs[1], steps[0].outputs[0]], attributes, domain=_DOMAIN)
    )
    # A 0 copies the dimension of the input: the batch rows and tokens that were looked up.
    flat = add_initializer(model, f"{name}.row.shape", np.array([0, 0, per_token * BLOCK]))
    steps.append(ir.node("Reshape", [steps[1].outputs[0], flat]))
    for number, step in enumerate(steps):
        step.name = f"{name}.{step.op_type}_{number}"
        step.outputs[0].type = scales.type
    out = steps[2].outputs[0]
    out.shape = node.outputs[0].shape
    model.graph.insert_before(node, steps)
    ir.convenience.replace_all_uses_with(node.outputs[0], out)
    model.graph.remove(node, safe=True)

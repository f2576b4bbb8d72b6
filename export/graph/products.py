"""Join the matrix products that read one input into one product with the concatenated weights.

Queries, keys and values are three products of one input; gate and up of an MLP are two. With several threads, each
product ends by waiting for the slowest thread, and each quantised product begins by rounding its input. A joined
product waits once and rounds once. The attention operator reads the joined queries, keys and values as they are; for
other readers a Split node separates the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .edit import add_initializer, is_read_once, is_weight


@dataclass(frozen=True)
class _Product:
    """`out = source @ weight`, or `out = source @ weight + bias` if there is a bias."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    out: ir.Value

    @property
    def width(self) -> int:
        assert self.weight.const_value is not None
        return int(self.weight.const_value.shape.numpy()[1])


def join_products(model: ir.Model) -> None:
    """Join the products of one module that read the same value; changes the graph in place.

    Args:
        model: the graph, whose weights have their modules' names and which has no unused nodes.
    """
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            _pack(model, node)
    groups: dict[tuple[int, str], list[_Product]] = {}
    for node in model.graph:
        product = _product(node)
        if product is None:
            continue
        module, _stem = _module_and_stem(str(product.weight.name))
        if module:  # a weight without a module's name belongs to no group
            groups.setdefault((id(product.source), module), []).append(product)
    for products in groups.values():
        if len(products) > 1:
            _join_and_split(model, products)


def _pack(model: ir.Model, attention: ir.Node) -> None:
    """Join queries, keys and values into one product, with biases if all three have one.

    If any other node lies between a product and the attention operator, this function joins nothing.
    """
    parts = [_product_with_bias(value) for value in attention.inputs[:3]]
    found = [part for part in parts if part is not None]
    if len(found) != 3 or len({id(part.source) for part in found}) != 1:
        return
    if len({part.bias is None for part in found}) != 1:
        return
    steps = _joined_product(model, found, f"{attention.name}.qkv")
    model.graph.insert_before(attention, steps)
    attention.replace_input_with(0, steps[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def _join_and_split(model: ir.Model, products: Sequence[_Product]) -> None:
    """Join the products, and split the result into parts that keep their names."""
    first = products[0].out.producer()
    assert first is not None
    steps = _joined_product(model, products, f"{first.name}.joined")
    weight = steps[0].inputs[1]
    assert weight is not None
    widths = add_initializer(model, f"{weight.name}.widths", np.array([product.width for product in products]))
    split = ir.node("Split", [steps[-1].outputs[0], widths], {"axis": -1}, num_outputs=len(products))
    model.graph.insert_before(first, [*steps, split])
    for product, part in zip(products, split.outputs, strict=True):
        old, name = product.out.producer(), product.out.name
        assert old is not None
        part.type, part.shape = product.out.type, product.out.shape
        ir.convenience.replace_all_uses_with(product.out, part)
        model.graph.remove(old, safe=True)
        part.name = name


def _joined_product(model: ir.Model, products: Sequence[_Product], unnamed: str) -> list[ir.Node]:
    """Return the nodes of the joined product: a MatMul, and an Add if the products have biases.

    The nodes are not in the graph yet. `unnamed` is the weight's name if the products have no joint name.
    """
    like, first = products[0].out, next(iter(products[0].weight.uses())).node
    name = _joint_name([str(product.weight.name) for product in products]) or unnamed
    # Use the node's current input: the recorded source may have become a part of another joined product since.
    steps = [ir.node("MatMul", [first.inputs[0], _concatenated(model, [p.weight for p in products], name)])]
    biases = [product.bias for product in products if product.bias is not None]
    if biases:
        bias = _concatenated(model, biases, f"{name.removesuffix('.weight')}.bias")
        steps.append(ir.node("Add", [steps[0].outputs[0], bias]))
    for step in steps:
        step.outputs[0].type = like.type
        if like.shape is not None:
            step.outputs[0].shape = ir.Shape([*like.shape[:-1], sum(product.width for product in products)])
    return steps


def _joint_name(names: Sequence[str]) -> str | None:
    """Return the joint name: `mlp.gate_up_proj.weight` for `mlp.gate_proj.weight` and `mlp.up_proj.weight`.

    Single letters are joined without an underscore. The result is None if the weights belong to different modules.
    """
    modules, stems = zip(*(_module_and_stem(name) for name in names), strict=True)
    if not modules[0] or len(set(modules)) != 1:
        return None
    fronts, _, ends = zip(*(stem.rpartition("_") for stem in stems), strict=True)
    if not all(fronts) or len(set(ends)) != 1:
        return f"{modules[0]}.{'_'.join(stems)}.weight"
    joint = ("" if all(len(front) == 1 for front in fronts) else "_").join(fronts)
    return f"{modules[0]}.{joint}_{ends[0]}.weight"


def _module_and_stem(weight: str) -> tuple[str, str]:
    """Split `layers.0.mlp.gate_proj.weight` into `layers.0.mlp` and `gate_proj`; a name without a dot has no module."""
    module, _, stem = weight.removesuffix(".weight").rpartition(".")
    return module, stem


def _product(node: ir.Node | None) -> _Product | None:
    """Return the product that `node` computes, if it multiplies by a weight that no other node reads."""
    if node is None or node.op_type != "MatMul" or not is_weight(node.inputs[1], 2):
        return None
    source, weight = node.inputs
    assert source is not None and weight is not None
    return _Product(source, weight, None, node.outputs[0])


def _product_with_bias(value: ir.Value | None) -> _Product | None:
    """Return the product that computes `value`, with its bias if it has one.

    The result is None if `value` is no such product, or if a second node reads it or one of its intermediate values.
    """
    node = value.producer() if value is not None else None
    if node is None or not is_read_once(node):
        return None
    if node.op_type != "Add":
        return _product(node)
    biases = [i for i in (0, 1) if is_weight(node.inputs[i], 1)]
    product = _product_with_bias(node.inputs[1 - biases[0]]) if len(biases) == 1 else None
    if product is None or product.bias is not None:
        return None
    return replace(product, bias=node.inputs[biases[0]], out=node.outputs[0])


def _concatenated(model: ir.Model, values: Sequence[ir.Value], name: str) -> ir.Value:
    """Replace the initializers with one that concatenates them along their last dimension."""
    arrays = [value.const_value.numpy() for value in values if value.const_value is not None]
    for value in values:
        del model.graph.initializers[str(value.name)]
    return add_initializer(model, name, np.concatenate(arrays, axis=-1))

"""Scale the residual stream of a graph down by a power of two, where it would overflow float16.

In some models the first position carries very large values through all layers (the attention sink, 104,000 in Gemma 3
270M), and float16 ends at 65,504. Whatever reads the residual stream reads it through a norm, and a norm gives the same
for s * x as for x, if its epsilon is s^2 as large. So everything that is added to the stream is multiplied by s: the
embedding, the scales of post-norms (Gemma), or else the weights of the layers that write to it. A power of two changes
exponents only. Keys, values and logits stay what they were.

A delta that is added to the stream is multiplied by s too, but it comes later: its slot states the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tp_runtime.errors import ModelFormatError
from tp_runtime.session import Slot

from ..decoder import blocks_of
from .edit import add_initializer, is_weight

_LARGEST = 2.0**15  # a stream that stays below half of float16's range is left alone
_TARGET_EXPONENT = 12  # a stream that does not is scaled to a sixteenth of the range: other texts and patches add to it

_NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")
_SKIP_BIAS = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 4}  # norms of a sum -> their bias input
_SUM = 3  # the output of these norms that is the sum
_EPSILON = 1e-5  # of a norm that states none


def residual_scale(model: Any, ids: Sequence[int]) -> float:
    """Return the power of two by which the residual stream of a torch model fits float16; 1 if it fits as it is.

    Args:
        model: the torch model in float32.
        ids: a text to measure on, with the tokens that every text begins with.
    """
    largest = 0.0

    def measure(_module: Any, args: tuple[Any, ...], out: Any = None) -> None:
        nonlocal largest
        value = args[0] if out is None else out[0] if isinstance(out, tuple) else out
        largest = max(largest, float(value.abs().max()))

    handles = []
    for block in blocks_of(model):
        handles.append(block.layer.register_forward_pre_hook(measure))
        handles.append(block.mlp_norm.register_forward_pre_hook(measure))
        handles.append(block.layer.register_forward_hook(measure))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return 1.0 if largest < _LARGEST else 2.0 ** (_TARGET_EXPONENT - math.frexp(largest)[1])


def scale_residual(model: ir.Model, slots: Sequence[Slot], scale: float) -> list[Slot]:
    """Multiply the residual stream of a float32 graph by `scale`.

    Args:
        model: a graph of the route `fused` whose slots are still required inputs; changed in place.
        slots: the slots of the graph.
        scale: a power of two.

    Returns:
        The slots; those whose deltas are added to the residual stream have the scale.

    Raises:
        ModelFormatError: something else than a norm or a sum reads the residual stream.
    """
    scaling = _Scaling(model, scale)
    scaling.run()
    return [replace(slot, scale=scale) if scaling.inputs & set(slot.tensors) else slot for slot in slots]


class _Scaling:
    """One pass over a graph, in the order of its nodes.

    Attributes:
        inputs: the names of the graph inputs that have to be scaled by whoever binds them.
    """

    def __init__(self, model: ir.Model, scale: float) -> None:
        self._model, self._scale = model, scale
        self._stream: set[ir.Value] = set()  # the values of the residual stream
        self.inputs: set[str] = set()

    def run(self) -> None:
        self._begin()
        for node in list(self._model.graph):
            if not self._stream.intersection(value for value in node.inputs if value is not None):
                continue
            if node.op_type in _NORMS:
                self._scale_epsilon(node)
            elif node.op_type in _SKIP_BIAS:
                self._scale_inputs(node, (0, 1, _SKIP_BIAS[node.op_type]))
                self._scale_epsilon(node)
                self._stream.update(node.outputs[_SUM:])
            elif node.op_type in ("Add", "Sum"):
                self._scale_inputs(node, range(len(node.inputs)))
                self._stream.update(node.outputs)
            elif node.op_type != "Shape":
                raise ModelFormatError(
                    "the residual stream overflows float16, and something else than a norm reads it",
                    field=str(node.name),
                    got=node.op_type,
                    wanted="a norm or a sum",
                    fix="use --precision bf16 or fp32",
                )

    def _begin(self) -> None:
        """Scale the looked-up embedding: the constant that it is multiplied by (Gemma), or else itself."""
        lookup = next(
            node for node in self._model.graph if node.op_type == "Gather" and _is_named(node.inputs[1], "input_ids")
        )
        readers = [use.node for use in lookup.outputs[0].uses()]
        if len(readers) == 1 and readers[0].op_type == "Mul":
            factors = [value for value in readers[0].inputs if value is not None and is_weight(value, 0)]
            if factors:
                self._scale_constant(factors[0])
                self._stream.add(readers[0].outputs[0])
                return
        embedding = self._scaled(lookup.outputs[0])
        if embedding is not lookup.outputs[0]:  # the table is tied to the head, which is not scaled
            for use in list(lookup.outputs[0].uses()):
                if use.node is not embedding.producer():
                    use.node.replace_input_with(use.idx, embedding)
        self._stream.add(embedding)

    def _scale_inputs(self, node: ir.Node, indices: Sequence[int]) -> None:
        for index in indices:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value not in self._stream:
                node.replace_input_with(index, self._scaled(value))

    def _scaled(self, value: ir.Value) -> ir.Value:
        """Return the value times the scale: the value itself if what computes it can be scaled, or else a product."""
        if value.is_graph_input():
            self.inputs.add(str(value.name))
            return value
        if any(is_weight(value, dimensions) for dimensions in (0, 1, 2)):
            self._scale_constant(value)
            return value
        node = value.producer()
        if node is not None and value is node.outputs[0] and len(value.uses()) == 1:
            if node.op_type in ("Add", "Sum"):
                self._scale_inputs(node, range(len(node.inputs)))
                return value
            if factors := _factors(node):
                for factor in factors:
                    self._scaled(factor)
                return value
        return self._multiplied(value)

    def _multiplied(self, value: ir.Value) -> ir.Value:
        name = f"{value.name}.residual"
        factor = add_initializer(self._model, f"{name}.scale", np.array(self._scale, np.float32))
        product = ir.node("Mul", [value, factor], name=f"{name}.Mul")
        product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
        producer = value.producer()
        assert producer is not None
        self._model.graph.insert_after(producer, product)
        return product.outputs[0]

    def _scale_constant(self, value: ir.Value) -> None:
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.tensor(array * array.dtype.type(self._scale), name=value.name)

    def _scale_epsilon(self, node: ir.Node) -> None:
        stated = node.attributes.get("epsilon")
        epsilon = _EPSILON if stated is None else stated.as_float()
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * self._scale**2)


def _factors(node: ir.Node) -> list[ir.Value]:
    """Return the inputs by which a node's output scales: a weight, a norm's scale and bias, a table, a slot's b."""
    if node.op_type in _NORMS or node.op_type in _SKIP_BIAS:  # a slot in front of a post-norm is fused with it
        inputs = node.inputs[1:] if node.op_type in _NORMS else node.inputs[2 : _SKIP_BIAS[node.op_type]]
        found = [value for value in inputs if value is not None]
        return found if all(is_weight(value, 1) for value in found) else []
    index = {"MatMul": 1, "FusedMatMul": 1, "Gather": 0}.get(node.op_type)
    factor = None if index is None else node.inputs[index]
    if factor is None or not (is_weight(factor, 2) or (node.op_type == "MatMul" and factor.is_graph_input())):
        return []
    return [factor]


def _is_named(value: ir.Value | None, name: str) -> bool:
    return value is not None and value.name == name

"""Quantise the weights of an exported graph in blocks.

Products with a constant weight become `MatMulNBits`, which unpacks one block at a time and, at accuracy level 4,
multiplies in int8. A decode step then reads an eighth to a quarter of the bytes. The lookup of token ids in the
embedding table becomes `GatherBlockQuantized`. If the head is tied to the table, both read the same packed tensor, so
the file stores it once.

The graph comes from a model that has the student's dequantised weights. An output of a product is found among the
student's by its values, since the graph may have joined, transposed or reordered the weights. So a graph computes with
exactly the blocks that the student has, and a weight that the student keeps in float32 stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np
import onnx_ir as ir

from ..progress import bar
from ..quantise import BLOCK, Blocks, FloatArray, QuantisedStudent, quantised
from .edit import add_initializer, replace_node

PLACES = "tp_weights"  # the graph's metadata: for each packed weight, the model's weights that its outputs belong to
Place = tuple[str, int]  # the name of a weight of the model, and the number of one of its outputs

_DOMAIN = "com.microsoft"
_INT8_ACTIVATIONS = 4  # an accuracy level: without it, int4 is no faster than float32 on most CPUs
# A graph that computes in float16 is meant for CUDA, which ignores the level. There the CPU rounds what CUDA rounds.
_OWN_ACTIVATIONS = 0
_PRODUCTS = ("MatMul", "FusedMatMul")
_TRANSPOSED = ("transA", "transBatchA", "transBatchB")  # attributes that MatMulNBits does not have


def quantise(model: ir.Model, student: QuantisedStudent) -> None:
    """Replace the weights of `model` with the student's blocks, in place.

    Args:
        model: a graph of the student's dequantised weights, with its final names and slots.
        student: the weights.
    """
    outputs = _Outputs(student.blocks)
    places: dict[str, list[Place]] = {}
    packed: dict[str, tuple[ir.Value, ir.Value, ir.Value | None, Blocks]] = {}

    def store(weight: ir.Value, values: FloatArray) -> bool:
        assert weight.name is not None
        if weight.name not in packed and (found := outputs.find(values)) is not None:
            blocks, places[weight.name] = found
            packed[weight.name] = (*_initializers(model, weight.name, blocks), blocks)
        return weight.name in packed

    level = _OWN_ACTIVATIONS if quantised(student.name).half else _INT8_ACTIVATIONS
    products = [node for node in model.graph if _weight_of(node) is not None]
    with bar("quantise", len(products), "weight") as shown:
        for node in products:
            shown.update()
            weight = _weight_of(node)
            assert weight is not None and weight.const_value is not None and weight.name is not None
            array = weight.const_value.numpy()
            if not store(weight, array.T if _transposed(node) else array):
                continue
            _replace_product(model, node, packed[weight.name], level)
    for node in list(model.graph):
        if node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            table = node.inputs[0]
            assert table is not None and table.name is not None and table.const_value is not None
            if table.const_value.shape.numpy()[1] % BLOCK:  # a row would end within a block
                continue
            if not store(table, table.const_value.numpy().T):
                continue
            _replace_lookup(model, node, packed[table.name])
    for name in packed:
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    model.opset_imports[_DOMAIN] = 1
    if student.weights_digest is not None:
        model.metadata_props[PLACES] = json.dumps(
            {
                name: {"inputs": blocks.inputs, "bits": blocks.bits, "outputs": _runs(found)}
                for name, found in places.items()
                for blocks in [packed[name][3]]
            }
        )


def _runs(places: Sequence[Place]) -> list[tuple[str, int, int]]:
    """Return places as runs (weight, first output, number of outputs) of consecutive ones."""
    runs: list[tuple[str, int, int]] = []
    for name, row in places:
        if runs and runs[-1][0] == name and sum(runs[-1][1:]) == row:
            runs[-1] = name, runs[-1][1], runs[-1][2] + 1
        else:
            runs.append((name, row, 1))
    return runs


class _Outputs:
    """The blocks of each output of the student's weights, found by the output's dequantised values.

    Args:
        blocks: the blocks of each weight, by its name.
    """

    def __init__(self, blocks: Mapping[str, Blocks]) -> None:
        self._blocks = blocks
        # Outputs of one kind can be joined. An output of zeros may occur in several kinds.
        self._places: dict[tuple[int, int, bool], dict[bytes, list[Place]]] = {}
        self._values: dict[Place, bytes] = {}
        self._taken: set[Place] = set()
        for name, own in blocks.items():
            places = self._places.setdefault((own.bits, own.block, own.zero_points is None), {})
            for row, values in enumerate(_digests(own.dequantised())):
                places.setdefault(values, []).append((name, row))
                self._values[name, row] = values

    def find(self, weight: FloatArray) -> tuple[Blocks, list[Place]] | None:
        """Return the blocks of a weight [K, N] and their places among the student's, or None if it has no such ones."""
        wanted = list(_digests(weight))
        for places in self._places.values():
            if all(values in places for values in wanted):
                found: list[Place] = []
                for values in wanted:
                    found.append(self._next(places[values], found[-1] if found else ("", -1)))
                    self._taken.add(found[-1])
                return self._joined(found, weight.shape[0]), found
        return None

    def _next(self, equal: list[Place], last: Place) -> Place:
        """Return which of equal outputs, such as the rows of unused tokens, is meant behind the place `last`.

        It is the next one of the same weight, or else any that no weight of the graph has yet. So each output of the
        student is found once before one is found again, as for a table that the graph holds twice.
        """
        after = last[0], last[1] + 1
        follows = self._values.get(after) == self._values[equal[0]]
        if follows and after not in self._taken:
            return after
        while len(equal) > 1 and equal[-1] in self._taken:
            equal.pop()
        return after if follows and equal[-1] in self._taken else equal[-1]

    def _joined(self, places: Sequence[Place], inputs: int) -> Blocks:
        rows = [(self._blocks[name], row) for name, row in places]
        zeros = [own.zero_points[row] for own, row in rows if own.zero_points is not None]
        return Blocks(
            np.stack([own.packed[row] for own, row in rows]),
            np.stack([own.scales[row] for own, row in rows]),
            np.stack(zeros) if zeros else None,
            rows[0][0].bits,
            inputs,
        )


def _digests(weight: FloatArray) -> Iterator[bytes]:
    """Yield a digest of each column of a weight [K, N]; adding 0 makes 0 of -0, which has other bytes."""
    for values in np.ascontiguousarray(weight.T) + np.float32(0):
        yield blake2b(values.tobytes(), digest_size=16).digest()


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
    attributes |= {"bits": blocks.bits, "block_size": blocks.block}
    product = ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, name=node.name)
    scale = node.attributes.get("alpha")  # a soft cap of the logits is folded into the head (Gemma 2)
    if scale is None or scale.as_float() == 1:
        replace_node(model, node, product)
        return
    model.graph.insert_before(node, product)
    factor = add_initializer(model, f"{node.name}.alpha", np.array(scale.as_float(), np.float32))
    replace_node(model, node, ir.node("Mul", [product.outputs[0], factor], name=f"{node.name}.scaled"))


def _replace_lookup(model: ir.Model, node: ir.Node, parts: tuple[ir.Value, ir.Value, ir.Value | None, Blocks]) -> None:
    """Look up rows of [tokens, blocks, block] and flatten them, so that the packed tensor keeps the head's form."""
    packed, scales, zeros, blocks = parts
    assert zeros is None  # the table has symmetric blocks in every precision
    tokens, per_token = blocks.scales.shape
    name = str(packed.name).removesuffix(".packed")
    steps = [
        ir.node("Reshape", [scales, add_initializer(model, f"{name}.scales.shape", np.array([tokens, per_token, 1]))]),
    ]
    attributes = {"gather_axis": 0, "quantize_axis": 2, "bits": blocks.bits, "block_size": blocks.block}
    steps.append(
        ir.node("GatherBlockQuantized", [packed, node.inputs[1], steps[0].outputs[0]], attributes, domain=_DOMAIN)
    )
    # A 0 copies the dimension of the input: the batch rows and tokens that were looked up.
    flat = add_initializer(model, f"{name}.row.shape", np.array([0, 0, per_token * blocks.block]))
    steps.append(ir.node("Reshape", [steps[1].outputs[0], flat]))
    for number, step in enumerate(steps):
        step.name = f"{name}.{step.op_type}_{number}"
        step.outputs[0].type = scales.type
    out = steps[2].outputs[0]
    out.shape = node.outputs[0].shape  # None on the optimum route, whose graph states no shapes between nodes
    model.graph.insert_before(node, steps)
    ir.convenience.replace_all_uses_with(node.outputs[0], out)
    model.graph.remove(node, safe=True)

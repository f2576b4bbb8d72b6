"""Complete a traced graph: add slot initializers and the input for last-position logits, and write the data files.

The traced graph has its slots as required inputs. This module makes them overridable: each slot gets an initializer
that is also a graph input. The initializer has rank 0, which is exactly the base model, and a session may bind a patch
instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import external_data

from tp_runtime.errors import ModelFormatError
from tp_runtime.patch import Delta, SlotKey
from tp_runtime.session import FIRST_LOGIT, Slot, slot_arrays

from .edit import add_initializer


def make_slots_overridable(
    model: ir.Model, slots: Sequence[Slot], defaults: Mapping[SlotKey, Delta], dtype: np.dtype
) -> list[ir.Value]:
    """Make each slot's required inputs initializers that are also inputs.

    Args:
        model: the traced graph, changed in place.
        slots: the slots of the graph.
        defaults: the deltas that become the defaults of their slots; every other slot gets rank 0.
        dtype: the dtype of the slots.

    Returns:
        The initializers that store `defaults`.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    default_values = []
    for slot in slots:
        delta = defaults.get((slot.layer, slot.site))
        # Each slot names its own dimensions, because ONNX Runtime requires dimensions of one name to be equal.
        rows, rank = f"{slot.name}.rows", f"{slot.name}.rank"
        shapes: list[list[int | str]] = [[rows, slot.inputs, rank], [rows, rank, slot.outputs], [rows, 1, slot.outputs]]
        for (name, array), shape in zip(slot_arrays(delta, slot, dtype).items(), shapes, strict=True):
            value = inputs[name]
            value.const_value = ir.tensor(array, name=name)
            value.shape = ir.Shape(shape)
            model.graph.register_initializer(value)
            if delta is not None:
                default_values.append(value)
    return default_values


def add_first_logit(model: ir.Model) -> None:
    """Add the overridable input `tp.first_logit` [1] int64, the first position whose logits the graph computes.

    With -1 the graph computes the logits of the last position only. A prompt needs no others, and on small models the
    head is up to two thirds of the work. With the default, 0, the graph computes the logits of all positions, as every
    other runtime expects.
    """
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    head, hidden = _head(logits)
    source = head.inputs[hidden]
    first = add_initializer(model, FIRST_LOGIT, np.zeros(1, np.int64))
    model.graph.inputs.append(first)
    last = add_initializer(model, "tp.last", np.array([np.iinfo(np.int64).max]))
    axis = add_initializer(model, "tp.axis", np.array([1], np.int64))
    node = ir.node("Slice", [source, first, last, axis], name="tp.first_logit.Slice")
    if source is not None and source.dtype is not None:  # optimum's graphs leave inner types to inference
        node.outputs[0].dtype = source.dtype
    model.graph.insert_before(head, node)
    head.replace_input_with(hidden, node.outputs[0])
    logits.shape = ir.Shape(["batch_size", "logits_length", *list(logits.shape or [])[2:]])


def _head(logits: ir.Value) -> tuple[ir.Node, int]:
    """Return the product with the head's weights, and the index of its hidden-state input; a soft cap may follow it."""
    node = logits.producer()
    while node is not None:
        hidden = next(i for i, value in enumerate(node.inputs) if value is not None and not value.is_initializer())
        if node.op_type not in ("Mul", "Div", "Tanh", "Cast"):
            return node, hidden
        value = node.inputs[hidden]
        node = None if value is None else value.producer()
    raise ModelFormatError("the graph has no head", field="logits", fix="report this architecture")


def save_graph(model: ir.Model, folder: Path, patch_values: Sequence[ir.Value]) -> list[str]:
    """Write `model.onnx`, its weights to `model.onnx_data` and the deltas of a default patch to `patch.onnx_data`.

    Args:
        model: the finished graph.
        folder: the folder to write into.
        patch_values: the initializers that store the default patch.

    Returns:
        The names of the files written.
    """
    in_patch = {id(value) for value in patch_values}
    groups: dict[str, list[ir.Value]] = {"model.onnx_data": [], "patch.onnx_data": []}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if id(value) in in_patch and value.const_value.nbytes:
            groups["patch.onnx_data"].append(value)
        elif value.const_value.nbytes >= 1024:
            groups["model.onnx_data"].append(value)
    written = ["model.onnx"]
    for file, values in groups.items():
        if not values:
            continue
        tensors = [value.const_value for value in values if value.const_value is not None]
        for value, tensor in zip(values, external_data.convert_tensors_to_external(tensors, folder, file), strict=True):
            value.const_value = tensor
        written.append(file)
    ir.save(model, folder / "model.onnx")
    return written

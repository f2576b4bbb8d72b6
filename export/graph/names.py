"""Name the weights and nodes of a traced graph after the modules they come from, and its dimensions as optimum does.

torch's exporter numbers the values that it folds and fuses (`val_57`, `node_linear_3`), and each version of it numbers
them differently. Users who read a profile or replace a weight need names like `layers.0.mlp.down_proj.weight` and
`layers.0.mlp.down_proj.MatMul`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPERS = re.compile(r"(\.(linear|tail|reader))+$")  # the wrappers of slot_modules.py
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_MODULE = re.compile(r"^([\w.]+?)\.(?:weight|bias|a|b)(?:\..*)?$")  # names of weights, their packed parts and slots


def name_weights(model: ir.Model) -> None:
    """Name every folded weight after the module that uses it, such as `model.layers.0.mlp.down_proj.weight`.

    torch's exporter folds transposes and names the result `val_57`. The node's metadata still holds the module path;
    this function drops the metadata after it has read the path.
    """
    taken = set(model.graph.initializers)
    for old, parameter in list(model.graph.initializers.items()):
        if old.startswith("model.") and old.removeprefix("model.") not in taken:  # the prefix of trace._Step
            taken.add(old.removeprefix("model."))
            parameter.name = old.removeprefix("model.")
    for node in model.graph:
        # All scopes but the last are module paths ('model.model.layers.0.self_attn.q_proj'); the last is the operation.
        *scopes, operation = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, "''"))
        paths = [path for path in scopes if path.startswith("model.")]
        if not paths or not operation.startswith("linear"):
            continue
        module = _WRAPPERS.sub("", paths[-1].removeprefix("model."))
        for value in node.inputs:
            if value is None or value.name is None or not value.is_initializer() or value.const_value is None:
                continue
            if not value.name.startswith("val_") or len(value.const_value.shape) < 2:
                continue
            name = f"{module}.weight"
            if name not in taken:
                taken.add(name)
                value.name = name
    ClearMetadataAndDocStringPass()(model)


def name_vectors(model: ir.Model, parameters: Mapping[str, NDArray[np.float32]]) -> None:
    """Name the scales of norms after their modules if the exporter folded them to 1 + weight (Gemma).

    Args:
        model: the graph, whose matrices have their names already; changed in place.
        parameters: the one-dimensional parameters of the torch model, by name.
    """
    taken = set(model.graph.initializers)
    found: dict[bytes, list[str]] = {}
    for name, array in parameters.items():
        if name not in taken:
            found.setdefault((array + np.float32(1)).tobytes(), []).append(name)
    for value in list(model.graph.initializers.values()):
        if value.const_value is None or value.is_graph_input() or len(value.const_value.shape) != 1:
            continue
        if names := found.get(value.const_value.numpy().tobytes()):
            value.name = names.pop(0)  # norms with equal scales may take each other's names


def name_nodes(model: ir.Model) -> None:
    """Name every node after the module whose weights it reads, or else the module that encloses the nodes it reads.

    Changes the graph in place. Call this last: nodes that are made later have no such names.
    """
    enclosing: dict[int, str] = {}  # id of a node -> the module that encloses the readers of its output
    counts: Counter[str] = Counter()
    for node in model.graph:
        module, read = _module(node), [value for value in node.inputs if value is not None]
        before = (value.producer() for value in read)
        outer = next((found for other in before if other is not None and (found := enclosing[id(other)])), "")
        if module is None:
            scope = outer or (str(read[0].name) if read and read[0].is_graph_input() else "")
            enclosing[id(node)] = scope
        else:
            scope = module  # a slot is no module of the model, so it does not enclose its readers
            enclosing[id(node)] = outer if module.startswith("tp.") else module.rpartition(".")[0]
        name = f"{scope}.{node.op_type}" if scope else node.op_type
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def _module(node: ir.Node) -> str | None:
    """Return the module whose weights a node reads, or None."""
    names = (str(value.name) for value in node.inputs if value is not None and value.is_initializer())
    return next((match[1] for name in names if (match := _MODULE.match(name))), None)


def name_dimensions(model: ir.Model) -> None:
    """Name the symbolic dimensions of inputs and outputs as optimum does; changes the graph in place."""
    named = {
        "input_ids": ["batch_size", "sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
    }
    for value in model.graph.inputs:
        if value.name in named:
            value.shape = ir.Shape(named[value.name])
        elif value.name and _PAST.fullmatch(value.name) and value.shape:
            value.shape = ir.Shape(["batch_size", value.shape[1], "past_sequence_length", value.shape[3]])
    for value in model.graph.outputs:
        if value.name and value.name.startswith("present.") and value.shape:
            value.shape = ir.Shape(["batch_size", value.shape[1], "total_sequence_length", value.shape[3]])

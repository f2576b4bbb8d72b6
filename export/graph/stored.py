"""Read the student of a quantised folder from its graph: exactly the blocks that the folder computes with.

A calibrated quantiser depends on the last bits of the calibration, and so on the machine and the number of threads. A
patch that is fitted behind the weights of a folder therefore takes them from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tp_runtime.errors import ModelFormatError
from tp_runtime.patch import FLOAT_PRECISIONS
from tp_runtime.session import GRAPH_FILE, ModelFolder

from ..quantise import BLOCK, Blocks, QuantisedStudent, quantised
from .quantise import PLACES

_Row = tuple[Any, ...]  # the packed values, the scales and the zero points of one output


def stored_student(model: Any, folder: ModelFolder) -> QuantisedStudent | None:
    """Return the student with the weights of an exported folder; None for a folder of a float precision.

    Args:
        model: the loaded model that the folder is an export of.
        folder: the folder.

    Raises:
        ModelFormatError: the graph lacks a weight of the model, or its weights do not have the folder's digest.
    """
    if folder.precision in FLOAT_PRECISIONS:
        return None
    graph = ir.load(folder.path / GRAPH_FILE)
    if PLACES not in graph.metadata_props:  # every quantiser without calibration gives the same blocks again
        precision = quantised(folder.precision)
        return QuantisedStudent.of(model, precision.with_narrow_blocks() if _has_narrow_blocks(graph) else precision)
    try:
        blocks = _blocks(graph)
        weights = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has two names
        named = {id(weights[name]): own for name, own in blocks.items() if name in weights}
        student = QuantisedStudent(model, folder.precision, named)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        raise _unknown(folder, "other weights, or an incomplete list of their places") from None
    if student.weights_digest != folder.weights_digest:
        raise _unknown(folder, f"weights with the digest {str(student.weights_digest)[:16]}")
    return student


def _has_narrow_blocks(graph: ir.Model) -> bool:
    """Return whether the graph's weights of eight bits have blocks of 32 alone, as those of earlier exports."""
    nodes = [node for node in graph.graph if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    return {_number(node, "block_size") for node in nodes if _number(node, "bits") == 8} == {BLOCK}


def _number(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _blocks(graph: ir.Model) -> dict[str, Blocks]:
    """Return the blocks of each weight whose outputs are all in the graph, by its name."""
    found: dict[str, dict[int, tuple[int, int, _Row]]] = {}  # by the name of a weight and the number of an output
    for packed, record in json.loads(graph.metadata_props[PLACES]).items():
        arrays = [_array(graph, f"{packed}.{part}") for part in ("packed", "scales", "zero_points")]
        places = [(name, first + row) for name, first, count in record["outputs"] for row in range(count)]
        for row, (name, output) in enumerate(places):
            own = tuple(None if array is None else array[row] for array in arrays)
            bits = record.get("bits") or arrays[0].shape[-1] * 8 // BLOCK  # earlier exports have blocks of 32 alone
            if bits not in (4, 8):
                raise ValueError("a weight of other bits than 4 and 8")
            found.setdefault(name, {})[output] = record["inputs"], bits, own
    return {name: _joined(rows) for name, rows in found.items() if sorted(rows) == list(range(len(rows)))}


def _array(graph: ir.Model, name: str) -> Any:
    value = graph.graph.initializers.get(name)
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _joined(rows: Mapping[int, tuple[int, int, _Row]]) -> Blocks:
    """Return the blocks of a weight from those of its outputs."""
    inputs, bits = rows[0][:2]
    packed, scales, zeros = (
        None if any(part is None for part in parts) else np.stack(parts)
        for parts in zip(*(rows[output][2] for output in range(len(rows))), strict=True)
    )
    if packed is None or scales is None:
        raise ValueError("a weight without values or scales")
    # A graph that computes in float16 stores scales in it; blocks have them in float32, and so has the digest.
    return Blocks(packed, scales.astype(np.float32), zeros, bits, inputs)


def _unknown(folder: ModelFolder, got: str) -> ModelFormatError:
    return ModelFormatError(
        "the graph does not give back the weights that the folder was exported with",
        field=str(folder.path / GRAPH_FILE),
        got=got,
        wanted=f"every weight of the model, with the digest {str(folder.weights_digest)[:16]}",
        fix="export the model again with this version of tp-export",
    )

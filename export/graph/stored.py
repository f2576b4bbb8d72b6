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
        ModelFormatError: the graph lacks a weight of the model.
    """
    if folder.precision in FLOAT_PRECISIONS:
        return None
    graph = ir.load(folder.path / GRAPH_FILE)
    if PLACES not in graph.metadata_props:  # every quantiser without calibration gives the same blocks again
        return QuantisedStudent.of(model, quantised(folder.precision))
    found: dict[str, dict[int, tuple[int, _Row]]] = {}  # by the name of a weight and the number of an output
    for packed, record in json.loads(graph.metadata_props[PLACES]).items():
        arrays = [_array(graph, f"{packed}.{part}") for part in ("packed", "scales", "zero_points")]
        rows = iter(range(len(arrays[1])))
        for name, first, count in record["outputs"]:
            for output in range(first, first + count):
                row = next(rows)
                own = tuple(None if array is None else array[row] for array in arrays)
                found.setdefault(name, {})[output] = record["inputs"], own
    blocks = {name: _joined(rows) for name, rows in found.items() if sorted(rows) == list(range(len(rows)))}
    weights = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has two names
    named = {id(weights[name]): own for name, own in blocks.items() if name in weights}
    try:
        return QuantisedStudent(model, folder.precision, named)
    except KeyError:
        raise _unknown(folder, f"{len(named)} whole weights") from None


def _array(graph: ir.Model, name: str) -> Any:
    value = graph.graph.initializers.get(name)
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _joined(rows: Mapping[int, tuple[int, _Row]]) -> Blocks:
    """Return the blocks of a weight from those of its outputs."""
    inputs = rows[0][0]
    packed, scales, zeros = (
        None if any(part is None for part in parts) else np.stack(parts)
        for parts in zip(*(rows[output][1] for output in range(len(rows))), strict=True)
    )
    assert packed is not None and scales is not None
    return Blocks(packed, scales, zeros, packed.shape[-1] * 8 // BLOCK, inputs)


def _unknown(folder: ModelFolder, got: str) -> ModelFormatError:
    return ModelFormatError(
        "the graph lacks a weight of the model",
        field=str(folder.path / GRAPH_FILE),
        got=got,
        wanted="every weight of the model",
        fix="export the model again with this version of tp-export",
    )

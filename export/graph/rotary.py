"""Move rotary embeddings into the attention operator.

`GroupQueryAttention` rotates queries and keys itself if it gets tables of cosines and sines for every position. That
removes two operators and four transposes per layer from the graph. While the model is traced, its rotary modules return
these tables instead of the cosines and sines of the current tokens. The function that would apply them leaves queries
and keys unchanged and passes the tables to the attention operator that follows.

The exported graph computes the tables from the frequencies. ONNX Runtime does so once, at load, and the file stores
half a head of numbers instead of tables with one row for every position of the window.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..decoder import adapter_for, kv_shape
from .attention import current_recording
from .edit import add_initializer

_APPLY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Rotary:
    """One rotary module of a model.

    Attributes:
        module: the module's name in the model; the tables are named `<module>.cos` and `<module>.sin`.
        frequencies: the frequencies in radians per position, [head dim / 2].
        scale: a factor on both tables.
    """

    module: str
    frequencies: Tensor
    scale: float

    def inputs(self) -> tuple[str, str]:
        """Return the names of the two tables in the traced graph."""
        return f"{self.module}.cos", f"{self.module}.sin"


def rotaries_of(model: nn.Module) -> list[Rotary]:
    """Return the rotary modules of `model`; an empty list if the attention operator cannot replace all of them."""
    _heads, head_dim = kv_shape(model.config.get_text_config())  # type: ignore[union-attr, operator]
    modules: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "inv_freq")]
    whole = all(2 * module.inv_freq.numel() == head_dim for _name, module in modules)
    if not modules or not whole or head_dim % 16 or not all(hasattr(m, _APPLY) for m in _rotating_modules(model)):
        return []
    return [Rotary(name, module.inv_freq.float(), float(module.attention_scaling)) for name, module in modules]


def _rotating_modules(model: nn.Module) -> list[Any]:
    """Return the Python modules that define the function which rotates queries and keys."""
    adapter = adapter_for(model.config.model_type)  # type: ignore[union-attr, arg-type]
    layers = model.get_submodule(adapter.layers).children()
    return [sys.modules[name] for name in {type(x.get_submodule(adapter.attention)).__module__ for x in layers}]


class _Tables(nn.Module):
    """Replaces a rotary module and returns the tables."""

    def __init__(self, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.tables


def _keep_tables(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_args: Any, **_kwargs: Any) -> Any:
    """Replace transformers' apply_rotary_pos_emb: keep the tables for the attention operator that follows."""
    current_recording().rotary = cos, sin
    return query, key


@contextmanager
def rotary_in_attention(
    model: nn.Module, rotaries: list[Rotary], tables: list[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Make `model` leave its rotary embeddings to the attention operator within the context.

    Args:
        model: the model to trace.
        rotaries: the rotary modules that `rotaries_of` returned; if there are none, the model is not changed.
        tables: the cosines and sines of each rotary module, [window, head dim / 2].
    """
    with ExitStack() as stack:
        for rotary, pair in zip(rotaries, tables, strict=True):
            original = model.get_submodule(rotary.module)
            stack.callback(model.set_submodule, rotary.module, original)
            model.set_submodule(rotary.module, _Tables(pair))
        for module in _rotating_modules(model) if rotaries else ():
            stack.enter_context(mock.patch.object(module, _APPLY, _keep_tables))
        yield


def compute_tables(model: ir.Model, rotaries: list[Rotary], window: int) -> None:
    """Replace the graph inputs that hold the tables with nodes that compute the tables from the frequencies."""
    inputs = {value.name: value for value in model.graph.inputs}
    first = model.graph[0]
    for rotary in rotaries:
        dtype = inputs[rotary.inputs()[0]].dtype
        ends = [
            add_initializer(model, f"{rotary.module}.{end}", np.float32(value))
            for end, value in (("first", 0), ("end", window), ("step", 1))
        ]
        frequencies = rotary.frequencies[None].cpu().numpy()
        steps: list[ir.Node] = [ir.node("Range", ends)]
        steps.append(ir.node("Unsqueeze", [steps[-1].outputs[0], add_initializer(model, f"{rotary.module}.axis", [1])]))
        inv_freq = add_initializer(model, f"{rotary.module}.inv_freq", frequencies)
        steps.append(ir.node("Mul", [steps[-1].outputs[0], inv_freq]))
        angles = steps[-1].outputs[0]
        for name, operator in zip(rotary.inputs(), ("Cos", "Sin"), strict=True):
            steps.append(ir.node(operator, [angles]))
            if rotary.scale != 1.0:
                scale = add_initializer(model, f"{name}.scale", np.array(rotary.scale, np.float32))
                steps.append(ir.node("Mul", [steps[-1].outputs[0], scale]))
            if dtype is not None and dtype != ir.DataType.FLOAT:
                steps.append(ir.node("Cast", [steps[-1].outputs[0]], {"to": int(dtype)}))
            table = steps[-1].outputs[0]
            old = inputs[name]
            table.name, table.shape, table.type = name, ir.Shape([window, frequencies.shape[1]]), old.type
            ir.convenience.replace_all_uses_with(old, table)
            model.graph.inputs.remove(old)
        for number, node in enumerate(steps):
            node.name = f"{rotary.module}.{node.op_type}_{number}"
            for output in node.outputs:
                if output.dtype is None:
                    output.dtype = ir.DataType.FLOAT
        model.graph.insert_before(first, steps)


def empty_tables(rotaries: list[Rotary], window: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return tables of zeros, in the right shape to trace with."""
    return [tuple(torch.zeros(window, len(r.frequencies), dtype=dtype) for _ in range(2)) for r in rotaries]  # type: ignore[misc]

"""Export a torch model to ONNX through optimum, for models that trace.py cannot export.

optimum traces every decoder that it has a configuration for, and exports attention as plain operators. The graph is
therefore larger and slower than the fused one, and its cache grows by concatenation instead of in place. Inputs and
outputs are the same: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key`, `tp.<layer>.<site>.a`, ...
-> `logits`, `present.N.key`, ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import external_data
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager
from torch import nn

from tp_runtime.errors import ModelFormatError
from tp_runtime.session import Slot
from tp_runtime.storage import temporary_folder

from ..decoder import SlotTensors, slotted
from .trace import quiet

_TASK = "text-generation-with-past"
_HOLDER = "tp_slots"  # the submodule that owns the slots' tensors while the model is traced


def trace(model: nn.Module, slots: Sequence[Slot]) -> ir.Model:
    """Export `model` with `slots` through optimum.

    Args:
        model: a transformers causal language model, unchanged after the call.
        slots: the slots of the model; the graph has them as required inputs, like a graph from trace.trace.

    Returns:
        The graph, with its weights named as in the model.

    Raises:
        ModelFormatError: optimum has no configuration for this architecture.
    """
    config = _export_config(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with quiet(), _registered(model, slots) as slot_names, temporary_folder(prefix="tp-optimum-") as folder:
        # Slots move a linear layer to `...down_proj.linear`, and a tied weight has two paths. This maps every path to
        # the one name that the weight has in the source model.
        sources = {
            f"{path}.{name}": names[id(parameter)]
            for path, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in names
        }
        file = folder / "model.onnx"
        try:
            export_pytorch(model, config, config.DEFAULT_ONNX_OPSET, file)
        finally:
            vars(model).pop("forward", None)  # optimum leaves its own forward on the instance
        graph = external_data.load_to_model(ir.load(file))
    _forget_shapes(graph)
    _slots_to_inputs(graph, slot_names)
    _name_weights(graph, sources)
    return graph


def _export_config(model: Any) -> Any:
    """Return optimum's description of the model's inputs and outputs, position ids included.

    optimum leaves position ids out if a model can count them itself (Gemma), but the runtime always passes them.
    """
    try:
        constructor = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task=_TASK, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ModelFormatError(
            "optimum cannot export this architecture",
            field="config.model_type",
            got=model.config.model_type,
            wanted="an architecture that optimum has an ONNX configuration for",
            fix="use --route fused, if that route can export this architecture",
        ) from error
    config = constructor(model.config, use_past=True, use_past_in_inputs=True)
    if "position_ids" not in config.inputs and "position_ids" in inspect.signature(model.forward).parameters:

        class WithPositions(type(config)):  # type: ignore[misc]
            @property
            def inputs(self) -> dict[str, dict[int, str]]:
                return {**super().inputs, "position_ids": {0: "batch_size", 1: "sequence_length"}}

        config.__class__ = WithPositions
    return config


@contextmanager
def _registered(model: nn.Module, slots: Sequence[Slot]) -> Iterator[dict[str, str]]:
    """Put the slots into `model` within the context.

    The TorchScript exporter keeps the names of parameters only, so the slots' tensors are parameters here. They are
    random, because the exporter would fold or merge zeros and equal tensors.

    Yields:
        The graph input's name for each initializer's name.
    """
    tensors, names, values = {}, {}, nn.ParameterList()
    for slot in slots:
        shapes = {"a": (1, slot.inputs, 1), "b": (1, 1, slot.outputs), "bias": (1, 1, slot.outputs)}
        parts = {part: nn.Parameter(torch.randn(shape), requires_grad=False) for part, shape in shapes.items()}
        tensors[slot.layer, slot.site] = SlotTensors(**parts)
        for part, value in parts.items():
            names[f"{_HOLDER}.{len(values)}"] = f"{slot.name}.{part}"
            values.append(value)
    try:
        with slotted(model, tensors):
            model.add_module(_HOLDER, values)
            yield names
    finally:
        delattr(model, _HOLDER)


def _forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of inner values: they were inferred at rank 1, and ONNX Runtime infers them again."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def _slots_to_inputs(model: ir.Model, names: Mapping[str, str]) -> None:
    for initializer, name in names.items():
        value = model.graph.initializers.pop(initializer)
        value.name, value.const_value = name, None
        model.graph.inputs.append(value)


def _name_weights(model: ir.Model, sources: Mapping[str, str]) -> None:
    """Give weights the names they have in the source model.

    The exporter folds the transpose of a linear layer and names the result `onnx::MatMul_8799`; the node's name still
    holds the module. If the exporter made a transposed copy of the embedding for a tied head, this function makes the
    head read the embedding again.
    """
    weights = model.graph.initializers
    for name in list(weights):
        if sources.get(name, name) not in weights:
            weights[name].name = sources[name]
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or weight.const_value is None or node.name is None:
            continue
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        source = sources.get(f"{module}.weight")
        if source is None or weight.name == source:
            continue
        if source not in weights:
            weight.name = source
        elif _is_transpose(weight.const_value, weights[source].const_value):
            node.op_type, node.domain = "FusedMatMul", "com.microsoft"
            node.attributes["transB"] = ir.AttrInt64("transB", 1)
            node.replace_input_with(1, weights[source])
            model.opset_imports["com.microsoft"] = 1
            if not weight.uses():
                del weights[str(weight.name)]


def _is_transpose(one: ir.TensorProtocol, other: ir.TensorProtocol | None) -> bool:
    return other is not None and np.array_equal(one.numpy(), other.numpy().T)

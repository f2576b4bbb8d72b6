"""Export a torch model to ONNX: trace one forward pass with a KV cache and patch slots, and fuse its operators.

The traced inputs and outputs have optimum's names (`input_ids`, `attention_mask`, `position_ids`,
`past_key_values.N.key`, ... -> `logits`, `present.N.key`, ...), so that ORTModelForCausalLM loads the folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from torch import Tensor, nn

from tp_runtime.errors import ModelFormatError
from tp_runtime.patch import KV_PARTS
from tp_runtime.session import Slot, past_name, present_name

from ..decoder import SlotTensors, kv_shape, slotted
from .attention import HEAD_MULTIPLE, PassThroughCache, fused_attention, recording
from .experts import traceable_experts
from .rotary import Rotary, compute_tables, empty_tables, rotaries_of, rotary_in_attention

OPSET = 20


class _Step(nn.Module):
    """The module that is traced: one forward step as a function of tensors only."""

    def __init__(self, model: nn.Module, slots: Sequence[Slot], rotaries: list[Rotary]) -> None:
        super().__init__()
        self.model, self.slots, self.rotaries = model, slots, rotaries

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
        slot_tensors: list[tuple[Tensor, Tensor, Tensor]],
        tables: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        slots = {
            (slot.layer, slot.site): SlotTensors(*tensors)
            for slot, tensors in zip(self.slots, slot_tensors, strict=True)
        }
        with (
            slotted(self.model, slots),
            recording(past, attention_mask, position_ids) as cache,
            rotary_in_attention(self.model, self.rotaries, tables),
        ):
            out = self.model(
                input_ids=input_ids, position_ids=position_ids, past_key_values=PassThroughCache(), use_cache=True
            )
        if len(cache.present) != len(past):
            raise ModelFormatError(
                "attention does not go through transformers' attention interface",
                field="model",
                got=f"{len(cache.present)} calls",
                wanted=f"{len(past)}",
            )
        return out.logits, cache.present


def context_window(config: Any) -> int:
    """Return the number of tokens that the exported graph can process.

    Some rotary tables change with the length of the text (`longrope`, as in Phi-3's long-context models). The graph has
    the tables for texts up to the length of pretraining, and its context window ends there.
    """
    rope = getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        return int(getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    return int(config.max_position_embeddings)


@contextlib.contextmanager
def _fixed_rotary_tables(model: nn.Module) -> Iterator[None]:
    """Keep rotary tables independent of the length of the text within the context; context_window explains why."""
    tables: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    before = [table.rope_type for table in tables]
    for table, rope_type in zip(tables, before, strict=True):
        if rope_type == "longrope":  # a long text that the model has read leaves the frequencies of long texts behind
            table.register_buffer("inv_freq", table.original_inv_freq, persistent=False)
        table.rope_type = "default"  # sets the update rule only; the module has its frequencies already
    try:
        yield
    finally:
        for table, rope_type in zip(tables, before, strict=True):
            table.rope_type = rope_type


def trace(model: nn.Module, slots: Sequence[Slot]) -> ir.Model:
    """Trace `model` with `slots` and fuse its operators for ONNX Runtime.

    In the example inputs the symbolic dimensions are distinct primes, so that the tracer cannot confuse two of them.

    Raises:
        ModelFormatError: the attention operator cannot compute the model's attention.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = config.num_hidden_layers
    kv_heads, head_dim = kv_shape(config)
    if head_dim % HEAD_MULTIPLE:
        raise ModelFormatError(
            "the attention operator of ONNX Runtime does not take this head size",
            field="head_dim",
            got=head_dim,
            wanted=f"a multiple of {HEAD_MULTIPLE}",
            fix="use --route optimum, or --route auto",
        )
    dtype = next(model.parameters()).dtype
    batch, steps, past, rank = 2, 5, 7, 3
    dim = torch.export.Dim.DYNAMIC
    rotaries, window = rotaries_of(model), context_window(config)
    arguments = {
        "input_ids": torch.ones(batch, steps, dtype=torch.long),
        "attention_mask": torch.ones(batch, past + steps, dtype=torch.long),
        "position_ids": torch.arange(past, past + steps).repeat(batch, 1),
        "past": [
            tuple(torch.zeros(batch, kv_heads, past, head_dim, dtype=dtype) for _ in range(2)) for _ in range(layers)
        ],
        "slot_tensors": [
            (
                torch.zeros(1, slot.inputs, rank, dtype=dtype),
                torch.zeros(1, rank, slot.outputs, dtype=dtype),
                torch.zeros(1, 1, slot.outputs, dtype=dtype),
            )
            for slot in slots
        ],
        "tables": empty_tables(rotaries, window, dtype),
    }
    shapes = {
        "input_ids": {0: dim, 1: dim},
        "attention_mask": {0: dim, 1: dim},
        "position_ids": {0: dim, 1: dim},
        "past": [({0: dim, 2: dim}, {0: dim, 2: dim})] * layers,
        "slot_tensors": [({2: dim}, {1: dim}, {})] * len(slots),
        "tables": [({}, {})] * len(rotaries),
    }
    past_names = [past_name(layer, part) for layer in range(layers) for part in KV_PARTS]
    table_names = [name for rotary in rotaries for name in rotary.inputs()]
    slot_names = [name for slot in slots for name in slot.tensors]
    present_names = [present_name(layer, part) for layer in range(layers) for part in KV_PARTS]
    with fused_attention(model), traceable_experts(model), _fixed_rotary_tables(model), quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Step(model, slots, rotaries),
            kwargs=arguments,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *past_names, *slot_names, *table_names],
            output_names=["logits", *present_names],
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        assert program is not None
        fused, _counts = optimize_for_ort(program.model)
    compute_tables(fused, rotaries, window)
    return fused


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress on stdout and their internal warnings; the caller shows a clock instead."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "optimum")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

"""Attention as one ONNX Runtime operator, by transformers' own attention interface.

While the model is traced its attention function emits `com.microsoft::GroupQueryAttention` instead of computing. The
operator appends the new keys and values to the past ones, masks causally (and to a window on sliding layers) and
returns the present cache, so that no pattern has to be found in a decomposed graph afterwards. Any model that goes
through transformers' attention interface comes out the same way.

Rotary embeddings of the whole head are turned in the operator too (onnx_rotary.py); others, such as GPT-NeoX's of a
quarter of it, stay in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

ATTENTION = "tp_group_query_attention"


@dataclass
class Recording:
    """The cache tensors of one traced forward pass.

    Attributes:
        past: per layer, key and value [batch, kv heads, past, head dim].
        seqlens: [batch] int32, tokens in the cache and the input together, minus one.
        total: scalar int32, the longest of them plus one.
        present: per layer, what the operator returned.
        positions: [batch, T] of the tokens, for the tables below.
        rotary: tables of cosines and sines [window, head dim / 2] that the next attention turns queries and keys by;
            None where that was done before it.
    """

    past: list[tuple[Tensor, Tensor]]
    seqlens: Tensor
    total: Tensor
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    positions: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None


_recording: list[Recording] = []


class PassThroughCache(Cache):
    """Keeps the model from concatenating keys and values: the operator does that."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """The new keys and values, untouched."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are given explicitly."""
        return 0

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        """Sizes of a mask that is never built."""
        return cache_position.shape[0], 0


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; query [b, heads, T, head dim] -> [b, T, heads, head dim]."""
    recording = _recording[-1]
    past_key, past_value = recording.past[module.layer_idx]  # type: ignore[index]
    batch, heads, steps, head_dim = query.shape
    kv_heads = key.shape[1]
    total = past_key.shape[2] + steps
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(_own_scale(module, head_dim) if scaling is None else scaling),
        "do_rotary": 0 if recording.rotary is None else 1,
    }
    turned: list[Tensor] = []
    if recording.rotary is not None:
        assert recording.positions is not None
        turned = [*recording.rotary, recording.positions]
    if sliding_window is not None:
        attributes["local_window_size"] = int(sliding_window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    rows = [x.transpose(1, 2).reshape(batch, steps, -1) for x in (query, key, value)]
    cache_shape = [batch, kv_heads, total, head_dim]
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*rows, past_key, past_value, recording.seqlens, recording.total, *turned],
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[[batch, steps, heads * head_dim], cache_shape, cache_shape],
        version=1,
    )
    recording.present.append((present_key, present_value))
    return out.reshape(batch, steps, heads, head_dim), None


def current_recording() -> Recording:
    """The recording in progress."""
    return _recording[-1]


def _own_scale(module: Any, head_dim: int) -> float:
    """The scale of GPT-2's attention, which does not pass one on."""
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The operator masks by itself."""


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Within the context `model` attends through the operator (only under torch.onnx.export)."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def recording(
    past: list[tuple[Tensor, Tensor]], attention_mask: Tensor, positions: Tensor | None = None
) -> Iterator[Recording]:
    """Within the context attention reads `past`, and its present caches are collected.

    Args:
        past: per layer, key and value [batch, kv heads, past, head dim].
        attention_mask: [batch, past + T], 1 on tokens; padding, if any, on the right.
        positions: [batch, T], where rotary tables are looked up.
    """
    seqlens = (attention_mask.sum(1) - 1).to(torch.int32)
    total = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
    current = Recording(past, seqlens, total, positions=positions)
    _recording.append(current)
    try:
        yield current
    finally:
        _recording.pop()

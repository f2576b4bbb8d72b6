"""Export attention as one ONNX Runtime operator, through transformers' own attention interface.

While the model is traced, its attention function emits `com.microsoft::GroupQueryAttention` instead of computing
attention. The operator appends the new keys and values to the past ones, masks causally (on sliding layers also to a
window) and returns the present cache. No pattern has to be found in a decomposed graph afterwards. This works for every
model that goes through transformers' attention interface.

The operator also applies rotary embeddings, if they rotate the whole head (rotary.py). Other rotary embeddings stay in
the graph in front of the operator: GPT-NeoX's, for example, rotate a quarter of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tp_runtime.errors import ModelFormatError

from ..decoder import attention_of, own_scale

ATTENTION = "tp_group_query_attention"
HEAD_MULTIPLE = 8  # ONNX Runtime refuses other head sizes, but only when the graph runs


@dataclass
class Recording:
    """The cache tensors of one traced forward pass.

    Attributes:
        past: the past key and value of each layer, [batch, kv heads, past, head dim].
        seqlens: the number of tokens in the cache and the input together, minus one, [batch] int32.
        total: the largest of these numbers plus one, scalar int32.
        present: the key and value of each layer that the operator returned.
        positions: the positions of the tokens, [batch, T], at which the operator reads the tables below.
        rotary: the tables of cosines and sines, [window, head dim / 2], by which the next attention operator rotates
            queries and keys; None if the model itself rotates them.
    """

    past: list[tuple[Tensor, Tensor]]
    seqlens: Tensor
    total: Tensor
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    positions: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None


_recording: list[Recording] = []


class PassThroughCache(Cache):
    """A cache that does not concatenate keys and values, because the operator does that."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Return the new keys and values unchanged."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return zero: the caller passes the positions explicitly."""
        return 0

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        """Return the sizes of a mask that is never built."""
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
    """Emit the operator; the signature is transformers', query [b, heads, T, head dim] -> [b, T, heads, head dim]."""
    recording = _recording[-1]
    past_key, past_value = recording.past[module.layer_idx]  # type: ignore[index]
    batch, heads, steps, head_dim = query.shape
    kv_heads = key.shape[1]
    if (kv_heads, head_dim) != (past_key.shape[1], past_key.shape[3]):
        raise ModelFormatError(
            "the attention of the model has another shape than its config states",
            field="config.json",
            got=f"{past_key.shape[1]} key/value heads of {past_key.shape[3]}",
            wanted=f"{kv_heads} of {head_dim}",
            fix="correct num_key_value_heads and head_dim, or leave them out",
        )
    total = past_key.shape[2] + steps
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(own_scale(module, head_dim) if scaling is None else scaling),
        "do_rotary": 0 if recording.rotary is None else 1,
    }
    rotary_inputs: list[Tensor] = []
    if recording.rotary is not None:
        assert recording.positions is not None
        rotary_inputs = [*recording.rotary, recording.positions]
    if sliding_window is not None:
        attributes["local_window_size"] = int(sliding_window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    rows = [x.transpose(1, 2).reshape(batch, steps, -1) for x in (query, key, value)]
    cache_shape = [batch, kv_heads, total, head_dim]
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*rows, past_key, past_value, recording.seqlens, recording.total, *rotary_inputs],
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[[batch, steps, heads * head_dim], cache_shape, cache_shape],
        version=1,
    )
    recording.present.append((present_key, present_value))
    return out.reshape(batch, steps, heads, head_dim), None


def current_recording() -> Recording:
    """Return the recording in progress."""
    return _recording[-1]


def fused_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Make `model` attend through the operator within the context; this works under torch.onnx.export only."""
    return attention_of(model, ATTENTION, _attention)


@contextmanager
def recording(
    past: list[tuple[Tensor, Tensor]], attention_mask: Tensor, positions: Tensor | None = None
) -> Iterator[Recording]:
    """Make attention read `past` within the context, and collect the present caches that it returns.

    Args:
        past: the past key and value of each layer, [batch, kv heads, past, head dim].
        attention_mask: 1 at every token and 0 at padding, [batch, past + T]; padding must be on the right.
        positions: the positions of the tokens, [batch, T], at which the operator reads the rotary tables.

    Yields:
        The recording that attention reads from and adds to.
    """
    seqlens = (attention_mask.sum(1) - 1).to(torch.int32)
    total = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
    current = Recording(past, seqlens, total, positions=positions)
    _recording.append(current)
    try:
        yield current
    finally:
        _recording.pop()

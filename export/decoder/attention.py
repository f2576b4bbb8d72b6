"""Attention of a transformers model behind stored entries, through transformers' own attention interface.

Within `attending`, every layer attends to its entries and to the text, under one softmax:

    out_i = sum_j P_ij value_j + sum_t P_it v_t        P_ij = exp(s_ij - LSE_i), s_ij = scale * q_i key_j

The number of entries may differ from layer to layer. A layer's cache holds its n entries at the places 0..n-1 and text
token t at the place n + t. A windowed layer sees the places above its own place - window. The exported graph's
attention operator counts its window in the same way, so this is what the runtime computes.

With an observer, each layer's queries, keys and values can be read on the way (export/compaction fits entries to them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "tp_behind_entries"

Entry = tuple[Tensor, Tensor]  # keys and values of one layer, [kv heads, n, head dim]


@dataclass(frozen=True)
class Heads:
    """What one attention layer computes with.

    Attributes:
        query: the rotated queries, [b, heads, T, head dim].
        key: the rotated keys of the text, [b, kv heads, S, head dim]; the last T of S belong to the queries.
        value: the values of the text, [b, kv heads, S, head dim].
        scale: the factor of the logits.
        window: the size of the layer's window in places; None if it sees everything.
        softcap: the bound of the logits, s -> softcap tanh(s / softcap); None if there is none.
        valid: whether each text position holds a token, [b, S]; None if all do or padding is on the right.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    softcap: float | None
    valid: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Return the logits as the softmax takes them."""
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def text_mask(self) -> Tensor:
        """Return whether query t sees text position s, [b or 1, T, S]. Every query sees itself, padding included."""
        steps, length = self.query.shape[2], self.key.shape[2]
        at = torch.arange(length, device=self.key.device)
        back = at[length - steps :, None] - at[None]  # how many places s lies before t
        seen = back >= 0
        if self.window is not None:
            seen = seen & (back < self.window)
        if self.valid is None:
            return seen[None]
        return (seen[None] & self.valid[:, None]) | (back == 0)

    def entries_mask(self, count: int) -> Tensor:
        """Return whether query t sees entry j of `count`, [b or 1, T, count]."""
        steps, length = self.query.shape[2], self.key.shape[2]
        at = torch.arange(length - steps, length, device=self.key.device)[None]
        if self.valid is not None:  # padding on the left takes no place
            at = at - (~self.valid).sum(1, keepdim=True)
        return entries_seen(at, count, self.window)


def entries_seen(text_places: Tensor, count: int, window: int | None) -> Tensor:
    """Return whether the text token t at each of `text_places` [...] sees entry j of `count`, [..., count].

    The token lies at the place count + t, so a window of W sees entry j if count + t - j < W.
    """
    back = count + text_places[..., None] - torch.arange(count, device=text_places.device)
    return torch.ones_like(back, dtype=torch.bool) if window is None else back < window


Observer = Callable[[int, Heads], None]
Result = Callable[[int, Tensor], None]


@dataclass(eq=False)  # a state is found by its identity: tensors have no single truth
class _State:
    entries: Sequence[Entry | None] | None
    valid: Tensor | None
    before: Observer | None
    after: Result | None


_states: list[_State] = []


@contextmanager
def attending(
    model: nn.Module,
    entries: Sequence[Entry | None] | None,
    *,
    valid: Tensor | None = None,
    before: Observer | None = None,
    after: Result | None = None,
) -> Iterator[None]:
    """Make every layer of `model` attend to `entries` and the text within the context.

    The model has to be called with position ids, and its attention mask has no effect.

    Args:
        model: a transformers causal language model whose attention goes through transformers' attention interface.
        entries: the keys and values of every layer; None for a layer, or for all, that has none.
        valid: whether each text position holds a token, [b, S]; None if padding, if any, is on the right.
        before: a callback that gets the number of a layer and its `Heads`, before the layer attends.
        after: a callback that gets the number of a layer and the outputs of its heads, [b, T, heads, head dim].
    """
    state = _State(entries, valid, before, after)
    _states.append(state)
    try:
        with attention_of(model, ATTENTION, _attention):
            yield
    finally:
        _states.remove(state)


@contextmanager
def attention_of(model: nn.Module, name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Make `model` attend through a function of transformers' attention interface within the context.

    transformers builds no mask for it: the function masks by itself.

    Args:
        model: a transformers causal language model whose attention goes through that interface.
        name: the name under which the function is registered.
        attention: the function.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


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
    """Attend; the signature is transformers', query [b, heads, T, head dim] -> [b, T, heads, head dim]."""
    state, layer = _states[-1], int(module.layer_idx)  # type: ignore[arg-type]
    scale = own_scale(module, query.shape[-1]) if scaling is None else scaling
    heads = Heads(query, key, value, scale, sliding_window, softcap, state.valid)
    if state.before is not None:
        state.before(layer, heads)
    out = attend(heads, None if state.entries is None else state.entries[layer])
    if state.after is not None:
        state.after(layer, out)
    return out, None


def layer_windows(model: Any) -> tuple[int | None, ...]:
    """Return the window of each layer in places, as its attention gets it; None for a layer that sees everything."""
    found: dict[int, int | None] = {}
    with attending(model, None, before=lambda layer, heads: found.update({layer: heads.window})), torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(ids, position_ids=torch.zeros_like(ids), use_cache=False, logits_to_keep=1)
    return tuple(found[layer] for layer in range(len(found)))


def attend(heads: Heads, entry: Entry | None) -> Tensor:
    """Return the outputs of the heads, [b, T, heads, head dim]."""
    rows, count, steps, size = heads.query.shape
    kv_heads = heads.key.shape[1]
    group = count // kv_heads
    key, value = heads.key.repeat_interleave(group, 1), heads.value.repeat_interleave(group, 1)
    seen = heads.text_mask()
    if entry is None and heads.softcap is None:
        out = scaled_dot_product_attention(heads.query, key, value, seen[:, None], scale=heads.scale)
        return out.transpose(1, 2).contiguous()
    logits = heads.capped(heads.query @ key.transpose(2, 3) * heads.scale).masked_fill(~seen[:, None], -torch.inf)
    if entry is None:
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous()
    # All rows share the entries, so their queries are stacked instead of the entries being copied for every row.
    front_key, front_value = (part.to(heads.key.device, heads.key.dtype) for part in entry)
    shape = rows, kv_heads, group * steps, size
    stacked = heads.query.reshape(shape).transpose(0, 1).reshape(kv_heads, -1, size)
    front = heads.capped(stacked @ front_key.transpose(1, 2) * heads.scale)
    front = front.view(kv_heads, rows, group * steps, -1).transpose(0, 1).reshape(rows, count, steps, -1)
    if heads.window is not None:
        front = front.masked_fill(~heads.entries_mask(front.shape[-1])[:, None], -torch.inf)
    shares = torch.cat([front, logits], -1).softmax(-1)
    out = shares[..., front.shape[-1] :] @ value
    stacked = shares[..., : front.shape[-1]].reshape(rows, kv_heads, group * steps, -1).transpose(0, 1)
    behind = stacked.reshape(kv_heads, rows * group * steps, -1) @ front_value
    out = out + behind.view(kv_heads, rows, group * steps, size).transpose(0, 1).reshape(rows, count, steps, size)
    return out.transpose(1, 2).contiguous()


def own_scale(module: Any, head_dim: int) -> float:
    """Return the scale of GPT-2's attention, which does not pass its scale to the attention function."""
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale

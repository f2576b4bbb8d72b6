"""The KV prefix of a patch in torch: a transformers model runs behind key/value entries instead of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tp_runtime.patch import KVPrefix, Patch

from .adapters import kv_shape


@dataclass(frozen=True)
class TorchPrefix:
    """`KVPrefix` as tensors on the model's device: of every layer, keys and values [1, kv heads, n, head dim]."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    replaces: tuple[int, ...]
    position: int

    def __len__(self) -> int:
        return int(self.keys[0].shape[2])

    def model_inputs(self, attention_mask: Tensor) -> dict[str, Any]:
        """What a transformers model is called with besides the ids, for ids with `attention_mask` [b, T] behind it."""
        rows, steps = attention_mask.shape
        kept = attention_mask.new_ones(rows, len(self))
        where = torch.arange(steps, device=attention_mask.device)
        return {
            "attention_mask": torch.cat([kept, attention_mask], 1),
            "position_ids": (self.position + where)[None].expand(rows, -1),
            "cache_position": len(self) + where,
            "past_key_values": _Frozen(self, rows),
            "use_cache": True,
        }

    def cache(self) -> DynamicCache:
        """A cache of one row that starts with the entries, and grows."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key, value, layer)
        return cache

    def numpy(self) -> KVPrefix:
        """For the patch, rounded to the half precision it will be stored in."""
        entries = {}
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for part, kept in zip(("key", "value"), pair, strict=True):
                entries[layer, part] = kept[0].transpose(0, 1).to(torch.float16).float().cpu().numpy()
        return KVPrefix(entries, self.replaces, self.position)


class _Frozen(DynamicCache):
    """A cache that shows every layer the prefix and what it is given, and keeps nothing: layers run more than once."""

    def __init__(self, prefix: TorchPrefix, rows: int) -> None:
        super().__init__()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            super().update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None) -> Any:
        """Past and present joined."""
        kept: Any = self.layers[layer_idx]
        past = kept.keys.to(key_states.device), kept.values.to(key_states.device)  # a device map moves layers
        return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)


def torch_prefix(patch: Patch, model: Any) -> TorchPrefix | None:
    """The prefix of a patch on the device of `model`, if it has one.

    Raises:
        PatchShapeError, PatchValueError: it does not fit the model.
    """
    prefix = patch.prefix
    if prefix is None:
        return None
    config, device, dtype = model.config, model.device, model.dtype
    prefix.check(config.num_hidden_layers, *kv_shape(config), config.vocab_size, config.max_position_embeddings)

    def part(name: str) -> list[Tensor]:
        arrays = [prefix.entries[layer, name] for layer in range(prefix.layers)]
        return [torch.tensor(array, device=device, dtype=dtype).transpose(0, 1)[None] for array in arrays]

    return TorchPrefix(part("key"), part("value"), prefix.replaces, prefix.position)

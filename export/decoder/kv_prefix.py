"""The KV prefix of a patch in torch: transformers models attend to stored key/value entries instead of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tp_runtime.patch import KVPrefix, Patch

from .adapters import kv_shape


@dataclass(frozen=True)
class TorchPrefix:
    """A `KVPrefix` as tensors on the model's device.

    Attributes:
        keys: the keys of every layer, [1, kv heads, n, head dim].
        values: the values of every layer, [1, kv heads, n, head dim].
        replaces: the token ids at the start of a prompt that the entries replace.
        position: the position of the first token after the entries, at least n.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    replaces: tuple[int, ...]
    position: int
    _frozen: dict[int, _Frozen] = field(default_factory=dict, compare=False, repr=False)  # by the number of rows

    def __len__(self) -> int:
        return int(self.keys[0].shape[2])

    def model_inputs(self, attention_mask: Tensor) -> dict[str, Any]:
        """Return the model's arguments other than the ids, for ids with `attention_mask` [b, T] after the prefix."""
        rows, steps = attention_mask.shape
        kept = attention_mask.new_ones(rows, len(self))
        where = torch.arange(steps, device=attention_mask.device)
        return {
            "attention_mask": torch.cat([kept, attention_mask], 1),
            "position_ids": (self.position + where)[None].expand(rows, -1),
            "cache_position": len(self) + where,
            "past_key_values": self._frozen_cache(rows),
            "use_cache": True,
        }

    def _frozen_cache(self, rows: int) -> _Frozen:
        """Return the cache of this many batch rows. A run leaves it as it was, so one serves every run."""
        if rows not in self._frozen:
            self._frozen[rows] = _Frozen(self, rows)
        return self._frozen[rows]

    def cache(self) -> DynamicCache:
        """Return a growing cache of one batch row that starts with the entries."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key, value, layer)
        return cache

    def numpy(self) -> KVPrefix:
        """Return the prefix for a patch file, rounded to the half precision that the file stores."""
        entries = {}
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for part, kept in zip(("key", "value"), pair, strict=True):
                entries[layer, part] = kept[0].transpose(0, 1).to(torch.float16).float().cpu().numpy()
        return KVPrefix(entries, self.replaces, self.position)


class _Frozen(DynamicCache):
    """A cache that never grows: layers run more than once, and each run sees only the prefix and its own tokens."""

    def __init__(self, prefix: TorchPrefix, rows: int) -> None:
        super().__init__()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            super().update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None) -> Any:
        """Return the prefix and the new keys and values, concatenated."""
        kept: Any = self.layers[layer_idx]
        past = kept.keys.to(key_states.device), kept.values.to(key_states.device)  # a device map may move layers
        return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)


def torch_prefix(patch: Patch, model: Any) -> TorchPrefix | None:
    """Return the KV prefix of a patch on the device of `model`; None if the patch has no prefix.

    Raises:
        PatchShapeError: the prefix does not fit the shape of the model's KV cache or its context window.
        PatchValueError: the prefix replaces token ids that the model does not have.
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

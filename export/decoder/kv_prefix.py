"""The KV prefix of a patch in torch: transformers models attend to stored key/value entries instead of the context."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tp_runtime.patch import KVPrefix, Patch

from .adapters import kv_shape
from .attention import Entry, attending


@dataclass(frozen=True)
class TorchPrefix:
    """A `KVPrefix` as tensors on the model's device.

    Attributes:
        entries: the keys and values of every layer, each [kv heads, n, head dim]; n may differ from layer to layer.
        replaces: the token ids at the start of a prompt that the entries replace.
        position: the position of the first token after the entries, at least the largest n.
        before_system: whether the entries stand in front of a system message of the prompt's own.
    """

    entries: Sequence[Entry]
    replaces: tuple[int, ...]
    position: int
    before_system: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries of each layer."""
        return tuple(int(key.shape[1]) for key, _value in self.entries)

    def before(self, model: Any, *, valid: Tensor | None = None) -> AbstractContextManager[None]:
        """Return a context within which the entries precede the text that `model` runs; see `attending`."""
        return attending(model, self.entries, valid=valid)

    def model_inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return the model's arguments other than the ids, for text [b, T] that follows the entries."""
        return {"position_ids": positions(ids, self.position), "use_cache": False}

    def numpy(self) -> KVPrefix:
        """Return the prefix as numpy arrays, for a patch file."""
        arrays = {}
        for layer, pair in enumerate(self.entries):
            for part, kept in zip(("key", "value"), pair, strict=True):
                arrays[layer, part] = kept.transpose(0, 1).float().cpu().numpy()
        return KVPrefix(arrays, self.replaces, self.position, self.before_system)


def positions(ids: Tensor, first: int) -> Tensor:
    """Return the positions [b, T] of text [b, T] whose first token has the position `first`."""
    return (first + torch.arange(ids.shape[1], device=ids.device))[None].expand(ids.shape[0], -1)


def cached_prompt(model: Any, ids: Sequence[int], replaces: Sequence[int]) -> TorchPrefix:
    """Run the beginning of a prompt once and return its keys and values, the exact entries.

    Args:
        model: a transformers causal language model.
        ids: the token ids of the beginning.
        replaces: the ids that stand in its place in a prompt without the context.

    Returns:
        All entries of every layer. In a windowed layer the text sees only those that its window reaches.
    """
    cache = DynamicCache()  # without the config, so that windowed layers keep everything
    with torch.no_grad():
        model(torch.tensor([list(ids)], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    return TorchPrefix([(layer.keys[0], layer.values[0]) for layer in layers], tuple(replaces), len(ids))


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

    def tensor(layer: int, part: str) -> Tensor:
        return torch.tensor(prefix.entries[layer, part], device=device, dtype=dtype).transpose(0, 1)

    entries = [(tensor(layer, "key"), tensor(layer, "value")) for layer in range(prefix.layers)]
    return TorchPrefix(entries, prefix.replaces, prefix.position, prefix.before_system)

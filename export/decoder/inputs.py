"""What a model passes to its decoder layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapter_for


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal language model: the embeddings, the layers and the last norm, without the head.

    The `base_model` of some classes, such as Gemma 3's text model, is the whole model.
    """
    layers = adapter_for(model.config.model_type).layers  # type: ignore[union-attr, arg-type]
    return model.get_submodule(layers.rpartition(".")[0])


class _Recorder(nn.Module):
    """Replaces a decoder layer, returns its input unchanged, and keeps the arguments that the layer would have got."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.original = [layer]  # in a list, so that torch does not register it as a submodule
        self.returns_tuple = returns_tuple
        self.x: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # transformers reads attention_type, for instance, to choose the layer's mask
            return getattr(self.__dict__["original"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # GPT-2 passes some arguments by position; every later call of the layer passes them by name.
        given = inspect.signature(self.original[0].forward).bind_partial(x, *args).arguments
        self.x, self.kwargs = x, {**dict(list(given.items())[1:]), **kwargs}
        return (x,) if self.returns_tuple else x


def layer_inputs(model: nn.Module, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return what the model passes to its layers.

    The decoder's own forward runs with every layer replaced by a recorder, so masks, position embeddings and embedding
    scales are transformers' own. The head does not run.

    Args:
        model: a transformers causal language model.
        input_ids: the token ids, [b, T].
        inputs: the other arguments of the model: an attention mask, and the cache of a KV prefix if there is one.

    Returns:
        The embeddings x, [b, T, d], and the keyword arguments of each layer.
    """
    adapter = adapter_for(model.config.model_type)  # type: ignore[union-attr, arg-type]
    layers = model.get_submodule(adapter.layers)
    recorders = [_Recorder(layer, adapter.returns_tuple) for layer in layers.children()]
    model.set_submodule(adapter.layers, nn.ModuleList(recorders))
    try:
        with torch.no_grad():
            decoder_of(model)(input_ids=input_ids, **inputs)
    finally:
        model.set_submodule(adapter.layers, layers)
    assert recorders[0].x is not None
    return recorders[0].x, [recorder.kwargs for recorder in recorders]


def plain_inputs(attention_mask: Tensor) -> dict[str, Any]:
    """Return the model's arguments other than the ids, for ids with a mask [b, T] and no KV prefix."""
    return {"attention_mask": attention_mask, "use_cache": False}

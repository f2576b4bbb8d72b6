"""Architecture adapters: where the sites of the method sit in a transformers decoder.

For one block, with the letters of docs/method.md:

    x  block input                         v = x + attention branch        (the input of `mlp_norm`)
    z = mlp_norm(v)                        h = act(gate z) * (up z)        (the input of `down`)
    o = v + post_norm(down h)              (`post_norm` only in Gemma-like blocks)

An adapter only says where things are. Attention, masks and rotary embeddings are always run by transformers' own
modules, so that a block design costs a few lines here and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tp_runtime.errors import ModelFormatError

if TYPE_CHECKING:
    from .prefix import TorchPrefix


@dataclass(frozen=True)
class Adapter:
    """Names of one architecture's modules, relative to a decoder layer."""

    mlp_norm: str
    post_norm: str | None = None
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention: str = "self_attn"
    qkvo: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    returns_tuple: bool = False  # what the layer's forward returns: (x, ...) or x

    def linears(self) -> dict[str, str]:
        """Every site beside one linear layer -> that layer's name."""
        q, k, v, o = (f"{self.attention}.{name}" for name in self.qkvo)
        return {"gate": self.gate, "up": self.up, "down": self.down, "q": q, "k": k, "v": v, "o": o}


LLAMA = Adapter(mlp_norm="post_attention_layernorm")
GEMMA = Adapter(mlp_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm", returns_tuple=True)

ADAPTERS: Mapping[str, Adapter] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a transformers `model_type`; ModelFormatError, listing the known ones, if there is none."""
    try:
        return ADAPTERS[model_type]
    except KeyError:
        raise ModelFormatError(
            "no adapter for this architecture",
            field="config.model_type",
            got=model_type,
            wanted=" | ".join(ADAPTERS),
            fix="add one to ADAPTERS in export/adapters.py: it names the modules of a block",
        ) from None


class _Reached(Exception):
    """Carries v out of a layer that was stopped at the door of its MLP half."""

    def __init__(self, v: Tensor) -> None:
        self.v = v


class Block:
    """One decoder layer, cut at the post-attention residual v.

    Args:
        layer: the transformers decoder layer.
        adapter: where its modules are.
        index: number of the layer.
    """

    def __init__(self, layer: nn.Module, adapter: Adapter, index: int) -> None:
        self.layer, self.adapter, self.index = layer, adapter, index
        self.mlp_norm = layer.get_submodule(adapter.mlp_norm)
        self.mlp = layer.get_submodule(adapter.mlp)
        self.gate = _linear(layer, adapter.gate)
        self.up = _linear(layer, adapter.up)
        self.down = _linear(layer, adapter.down)
        self.post_norm = layer.get_submodule(adapter.post_norm) if adapter.post_norm else None

    @property
    def tail(self) -> nn.Module:
        """The module whose output joins the residual: the post-norm if there is one, else `down`."""
        return self.down if self.post_norm is None else self.post_norm

    def attention_half(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """x [b, T, d] -> v [b, T, d], by running the layer itself and stopping it at `mlp_norm`."""

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        handle = self.mlp_norm.register_forward_pre_hook(stop)
        try:
            self.layer(x, **kwargs)
        except _Reached as reached:
            return reached.v
        finally:
            handle.remove()
        raise ModelFormatError(
            "the layer never reached its MLP norm", field=self.adapter.mlp_norm, fix="correct the adapter's mlp_norm"
        )

    def mlp_half(self, v: Tensor) -> Tensor:
        """v [..., d] -> o [..., d]: the second residual branch, through the layer's own modules and their hooks."""
        branch = self.mlp(self.mlp_norm(v))
        return v + (branch if self.post_norm is None else self.post_norm(branch))

    def hidden(self, v: Tensor) -> Tensor:
        """v [..., d] -> h [..., f], what `down` is given."""
        seen: list[Tensor] = []
        handle = self.down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            self.mlp(self.mlp_norm(v))
        finally:
            handle.remove()
        return seen[0]


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ModelFormatError(
            "not a linear layer",
            field=name,
            got=type(linear).__name__,
            wanted="torch.nn.Linear",
            fix="load it in float32",
        )
    return linear


def blocks_of(model: nn.Module, adapter: Adapter | None = None) -> list[Block]:
    """The blocks of a transformers causal language model, in order; by default as its own adapter sees them."""
    adapter = adapter or adapter_for(model.config.model_type)  # type: ignore[union-attr, arg-type]
    return [Block(layer, adapter, i) for i, layer in enumerate(model.model.layers)]  # type: ignore[union-attr, arg-type]


class _Recorder(nn.Module):
    """Stands in for a decoder layer, hands its input on unchanged and keeps what the layer would have been given."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.original = [layer]  # in a list, so that it is no submodule
        self.returns_tuple = returns_tuple
        self.x: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # e.g. attention_type, which picks the layer's mask
            return getattr(self.__dict__["original"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise ModelFormatError("the model passes layer inputs by position", field="layer", got=len(args))
        self.x, self.kwargs = x, kwargs
        return (x,) if self.returns_tuple else x


def layer_inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, prefix: TorchPrefix | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the model gives its layers: the embeddings x [b, T, d] and each layer's keyword arguments.

    With a prefix, those of ids [b, T] that follow it.

    The model's own forward runs with every layer replaced by a recorder, so masks, rotary tables and embedding scales
    are transformers' own.
    """
    inner: Any = model.model
    layers = inner.layers
    adapter = adapter_for(inner.config.model_type)
    recorders = [_Recorder(layer, adapter.returns_tuple) for layer in layers]
    inner.layers = nn.ModuleList(recorders)
    plain = {"attention_mask": attention_mask, "use_cache": False}
    try:
        with torch.no_grad():
            inner(input_ids=input_ids, **(plain if prefix is None else prefix.model_inputs(attention_mask)))
    finally:
        inner.layers = layers
    assert recorders[0].x is not None
    return recorders[0].x, [recorder.kwargs for recorder in recorders]

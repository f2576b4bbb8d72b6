"""Architecture adapters: which modules of a transformers decoder are the sites of the method.

These are the values in one block, with the letters of docs/method.md:

    x  block input                         v = x + attention branch
    u  the input of the MLP half: v, or x itself if attention and MLP run in parallel
    z = mlp_norm(u)                        h = act(gate z) * (up z), or act(up z)     (the input of `down`)
    o = v + post_norm(down h)              (`post_norm` only in Gemma-like blocks)

A block has a split point between its attention half and its MLP half. The tensor at the split point, called `split` in
this file, is all that the MLP half needs. In a sequential block it is v [..., d]; in a parallel block it is v and u,
concatenated [..., 2d]. It is one tensor in both cases, so code that gathers its rows works for both.

An adapter only names modules. transformers' own modules always run attention, masks, rotary embeddings and routing, so
a block design needs a few lines here and nothing elsewhere (docs/architectures.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tp_runtime.errors import ModelFormatError


@dataclass(frozen=True)
class Adapter:
    """The names of one architecture's modules.

    Attributes:
        mlp_norm: the norm in front of the MLP, relative to a decoder layer.
        post_norm: the norm of the MLP branch's output, relative to a decoder layer; None if there is no such norm.
        mlp: the MLP, or the mixture of experts, relative to a decoder layer.
        attention: the attention module, relative to a decoder layer.
        attention_norm: the norm of the attention branch's output, relative to a decoder layer; None if there is none.
        reads_z: site -> the linear layer that reads z, relative to the MLP or to one expert.
        down: the linear layer that reads h, relative to the MLP or to one expert.
        router: the router of a mixture of experts, relative to `mlp`; None if the architecture has no mixture.
        experts: the list of experts, relative to `mlp`; layers without it are treated as ordinary ones.
        attention_linears: site -> linear layer, relative to `attention`.
        parallel: the attribute of a layer that states whether its MLP reads x instead of v; None if no MLP does.
        layers: the list of layers, relative to the causal language model.
        returns_tuple: whether a layer's forward returns (x, ...) instead of x.
    """

    mlp_norm: str
    post_norm: str | None = None
    mlp: str = "mlp"
    attention: str = "self_attn"
    attention_norm: str | None = None
    reads_z: Mapping[str, str] = field(default_factory=lambda: {"gate": "gate_proj", "up": "up_proj"})
    down: str = "down_proj"
    router: str | None = None
    experts: str = "experts"
    attention_linears: Mapping[str, str] = field(
        default_factory=lambda: {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    )
    parallel: str | None = None
    layers: str = "model.layers"
    returns_tuple: bool = False


LLAMA = Adapter(mlp_norm="post_attention_layernorm")
GEMMA = Adapter(
    mlp_norm="pre_feedforward_layernorm",
    post_norm="post_feedforward_layernorm",
    attention_norm="post_attention_layernorm",
    returns_tuple=True,
)

ADAPTERS: Mapping[str, Adapter] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": Adapter(
        mlp_norm="post_attention_layernorm",
        reads_z={"gate_up": "gate_up_proj"},
        attention_linears={"qkv": "qkv_proj", "o": "o_proj"},
    ),
    "gpt2": Adapter(
        mlp_norm="ln_2",
        reads_z={"up": "c_fc"},
        down="c_proj",
        attention="attn",
        attention_linears={"qkv": "c_attn", "o": "c_proj"},
        layers="transformer.h",
        returns_tuple=True,
    ),
    "gpt_neox": Adapter(
        mlp_norm="post_attention_layernorm",
        reads_z={"up": "dense_h_to_4h"},
        down="dense_4h_to_h",
        attention="attention",
        attention_linears={"qkv": "query_key_value", "o": "dense"},
        parallel="use_parallel_residual",
        layers="gpt_neox.layers",
        returns_tuple=True,
    ),
    "mixtral": Adapter(
        mlp_norm="post_attention_layernorm",
        mlp="block_sparse_moe",
        reads_z={"gate": "w1", "up": "w3"},
        down="w2",
        router="gate",
    ),
    "qwen3_moe": Adapter(mlp_norm="post_attention_layernorm", router="gate"),
}


def adapter_for(model_type: str) -> Adapter:
    """Return the adapter of a transformers `model_type`.

    Raises:
        ModelFormatError: there is no adapter for `model_type`; the message lists the known ones.
    """
    try:
        return ADAPTERS[model_type]
    except KeyError:
        raise ModelFormatError(
            "there is no adapter for this architecture",
            field="config.model_type",
            got=model_type,
            wanted=" | ".join(ADAPTERS),
            fix="add an adapter that names the modules of a block to ADAPTERS in export/decoder/adapters.py",
        ) from None


class Mlp(NamedTuple):
    """One MLP, or one expert: the linear layers that read z, by site, and the linear layer that reads h."""

    reads_z: dict[str, nn.Module]
    down: nn.Module


class AttentionOutput(NamedTuple):
    """The way from a block's heads to the residual stream: gain * (W_O heads + bias) / rms(W_O heads + bias).

    Attributes:
        weight: the output projection W_O, [d, heads * head dim].
        bias: its bias, [d]; None if it has none.
        gain: the gain of the post-norm, [d]; None if there is no post-norm, and then nothing is divided.
        eps: what the post-norm adds to the mean square.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    eps: float


class _Stopped(Exception):
    """Stops a layer at its split point, and holds the tensor there."""

    def __init__(self, split: Tensor) -> None:
        self.split = split


class Block:
    """One decoder layer, as two halves with a split point between them.

    Args:
        layer: the transformers decoder layer.
        adapter: the names of the layer's modules.
        index: the number of the layer.

    Attributes:
        parallel: whether the MLP reads x instead of v.
        mlp_norm: the norm in front of the MLP.
        post_norm: the norm of the MLP branch's output; None if there is no such norm.
        mlp: the MLP, or the mixture of experts.
        mlps: a list of the one MLP, or of every expert.
        router: the router of a mixture of experts; None in an ordinary layer.
        linears: for every site at the output of one linear layer, that layer's name, relative to `layer`. The linear
            layers of experts are not among them.
        reader: the name of the module whose input `mlp_out` reads. This is `down`, whose input is h, or the mixture of
            experts, whose input is z: in a mixture, h differs from expert to expert.
        tail: the name of the module to whose output `mlp_out` adds. This output is added to the residual stream.
    """

    def __init__(self, layer: nn.Module, adapter: Adapter, index: int) -> None:
        self.layer, self.adapter, self.index = layer, adapter, index
        self.parallel = adapter.parallel is not None and bool(getattr(layer, adapter.parallel))
        self.mlp_norm = layer.get_submodule(adapter.mlp_norm)
        self.post_norm = layer.get_submodule(adapter.post_norm) if adapter.post_norm else None
        self.mlp = layer.get_submodule(adapter.mlp)
        self.linears = {site: f"{adapter.attention}.{name}" for site, name in adapter.attention_linears.items()}
        self.router: nn.Module | None = None
        if adapter.router is not None and hasattr(self.mlp, adapter.experts):
            self.router = linear_of(self.mlp, adapter.router)
            members = list(self.mlp.get_submodule(adapter.experts).children())
            self.reader = adapter.mlp
        else:
            members = [self.mlp]
            self.reader = f"{adapter.mlp}.{adapter.down}"
            self.linears |= {site: f"{adapter.mlp}.{name}" for site, name in adapter.reads_z.items()}
            self.linears["down"] = self.reader
        self.tail = adapter.post_norm or self.reader
        self.mlps = [
            Mlp(
                {site: linear_of(member, name) for site, name in adapter.reads_z.items()},
                linear_of(member, adapter.down),
            )
            for member in members
        ]

    def attention_output(self) -> AttentionOutput:
        """Return how the block's heads reach the residual stream; the weights are those that it has now."""
        linear: Any = self.layer.get_submodule(self.linears["o"])
        weight = weight_of(linear)
        if self.adapter.attention_norm is None:
            return AttentionOutput(weight, linear.bias, None, 0.0)
        norm: Any = self.layer.get_submodule(self.adapter.attention_norm)
        gain = norm(weight.new_ones(1, weight.shape[0]))[0]  # the norm divides by a root mean square, which is 1 here
        return AttentionOutput(weight, linear.bias, gain, float(norm.eps))

    def attention_half(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Run the layer itself up to its split point.

        Args:
            x: the input of the layer, [b, T, d].
            kwargs: the other arguments of the layer.

        Returns:
            The tensor at the split point, [b, T, d or 2d].

        Raises:
            ModelFormatError: the layer did not run the module that the adapter names as the MLP norm.
        """

        def stop(split: Tensor) -> None:
            raise _Stopped(split)

        with self.at_split(stop):
            try:
                self.layer(x, **kwargs)
            except _Stopped as stopped:
                return stopped.split
        raise ModelFormatError(
            "the layer did not run its MLP norm", field=self.adapter.mlp_norm, fix="correct the adapter's mlp_norm"
        )

    @contextmanager
    def at_split(self, reached: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `reached` with the tensor at the split point [b, T, d or 2d] whenever the layer runs in the context."""
        branch: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, out: tuple[Tensor, ...]) -> None:
            branch[:] = out[:1]

        def report(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            u = args[0]
            reached(torch.cat([u + branch.pop(), u], -1) if self.parallel else u)

        attention = self.layer.get_submodule(self.adapter.attention)
        handles = [attention.register_forward_hook(keep)] if self.parallel else []
        handles.append(self.mlp_norm.register_forward_pre_hook(report))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def residual(self, split: Tensor) -> Tensor:
        """Return v [..., d], to which the MLP branch is added."""
        return split.chunk(2, -1)[0] if self.parallel else split

    def normed(self, split: Tensor) -> Tensor:
        """Return z [..., d], which the MLP reads."""
        return self.mlp_norm(split.chunk(2, -1)[1] if self.parallel else split)

    def mlp_half(self, split: Tensor) -> Tensor:
        """Return o [..., d], the sum of v and the MLP branch, computed by the layer's own modules and their hooks."""
        out = self.branch(split)
        if self.post_norm is not None:
            out = self.post_norm(out)
        v = self.residual(split)
        return v + out.reshape(v.shape)

    def hidden(self, split: Tensor) -> Tensor:
        """Return the values that `mlp_out` reads: h [..., f], or z [..., d] of a mixture of experts."""
        return self.mlp_half_and_hidden(split)[1]

    def mlp_half_and_hidden(self, split: Tensor) -> tuple[Tensor, Tensor]:
        """Return both `mlp_half` and `hidden`, from one pass."""
        seen: list[Tensor] = []
        reader = self.layer.get_submodule(self.reader)
        handle = reader.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            out = self.mlp_half(split)
        finally:
            handle.remove()
        return out, seen[0].reshape(*split.shape[:-1], -1)

    def branch(self, split: Tensor) -> Tensor:
        """Return the output of the MLP before any post-norm, always as [b, T, d], as experts take and return it."""
        z = self.normed(split)
        out = self.mlp(z if z.ndim == 3 else z.reshape(1, -1, z.shape[-1]))
        return out[0] if isinstance(out, tuple) else out


def linear_of(parent: nn.Module, name: str) -> nn.Module:
    """Return the linear layer `name` of `parent`.

    Raises:
        ModelFormatError: the module is not a plain linear layer; it may be a quantised one.
    """
    linear = parent.get_submodule(name)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise ModelFormatError(
            "the module is not a linear layer",
            field=name,
            got=type(linear).__name__,
            wanted="torch.nn.Linear",
            fix="load the model in float32",
        )
    return linear


def weight_of(linear: nn.Module) -> Tensor:
    """Return a view of a linear layer's weight as [out, in]: GPT-2's Conv1D stores [in, out]."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


def blocks_of(model: nn.Module, adapter: Adapter | None = None) -> list[Block]:
    """Return the blocks of a transformers causal language model, in order; `adapter` defaults to the model's own."""
    adapter = adapter or adapter_for(model.config.model_type)  # type: ignore[union-attr, arg-type]
    return [Block(layer, adapter, i) for i, layer in enumerate(model.get_submodule(adapter.layers).children())]


def kv_shape(config: Any) -> tuple[int, int]:
    """Return the number of key/value heads of a layer and their size."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, head_dim

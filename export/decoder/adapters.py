"""Architecture adapters: where the sites of the method sit in a transformers decoder.

For one block, with the letters of docs/method.md:

    x  block input                         v = x + attention branch
    u  what the MLP half reads: v, or x itself where attention and MLP run in parallel
    z = mlp_norm(u)                        h = act(gate z) * (up z), or act(up z)     (the input of `down`)
    o = v + post_norm(down h)              (`post_norm` only in Gemma-like blocks)

A block is cut between its halves. The cut is all that the MLP half needs: v [..., d] in a sequential block, v and u
side by side [..., 2d] in a parallel one. It is one tensor either way, so who gathers rows of it need not know which.

An adapter only says where things are. Attention, masks, rotary embeddings and routing are always run by transformers'
own modules, so that a block design costs a few lines here and nothing elsewhere (docs/architectures.md).
"""

from __future__ import annotations

import inspect
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
    """Names of one architecture's modules.

    Attributes:
        mlp_norm: the norm in front of the MLP, relative to a decoder layer like the next three.
        post_norm: the norm of what the MLP branch returns, if there is one.
        mlp: the MLP, or the mixture of experts.
        attention: the attention module.
        reads_z: site -> linear that reads z, relative to the MLP or to one expert.
        down: the linear that reads h, likewise.
        router, experts: of a mixture, relative to `mlp`; layers without `experts` are taken for ordinary ones.
        attention_linears: site -> linear, relative to `attention`.
        parallel: the attribute of a layer that says that its MLP reads x, not v; None: it never does.
        layers: the list of layers, relative to the causal language model.
        returns_tuple: whether a layer's forward returns (x, ...) or x.
    """

    mlp_norm: str
    post_norm: str | None = None
    mlp: str = "mlp"
    attention: str = "self_attn"
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
GEMMA = Adapter(mlp_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm", returns_tuple=True)

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


class Mlp(NamedTuple):
    """One MLP, or one expert: the linears that read z, by site, and the one that reads h."""

    reads_z: dict[str, nn.Module]
    down: nn.Module


class _Reached(Exception):
    """Carries the cut out of a layer that was stopped at the door of its MLP half."""

    def __init__(self, cut: Tensor) -> None:
        self.cut = cut


class Block:
    """One decoder layer, cut between its halves.

    Args:
        layer: the transformers decoder layer.
        adapter: where its modules are.
        index: number of the layer.

    Attributes:
        mlps: the MLP, or every expert.
        router: of a mixture of experts.
        linears: every site beside one linear layer -> that layer's name, relative to `layer`. Experts have none.
        reader, tail: names of the modules between which `mlp_out` acts: it reads the input of the first, h of `down` (z
            of a mixture, whose h differs from expert to expert), and adds to the output of the second, which joins the
            residual.
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

    def attention_half(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """x [b, T, d] -> the cut [b, T, d or 2d], by running the layer itself and stopping it at its MLP half."""

        def stop(cut: Tensor) -> None:
            raise _Reached(cut)

        with self.at_cut(stop):
            try:
                self.layer(x, **kwargs)
            except _Reached as reached:
                return reached.cut
        raise ModelFormatError(
            "the layer never reached its MLP norm", field=self.adapter.mlp_norm, fix="correct the adapter's mlp_norm"
        )

    @contextmanager
    def at_cut(self, reached: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the context `reached` is given the cut [b, T, d or 2d] whenever the layer runs into its MLP half."""
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

    def residual(self, cut: Tensor) -> Tensor:
        """cut -> v [..., d], what the MLP branch is added to."""
        return cut.chunk(2, -1)[0] if self.parallel else cut

    def normed(self, cut: Tensor) -> Tensor:
        """cut -> z [..., d], what the MLP reads."""
        return self.mlp_norm(cut.chunk(2, -1)[1] if self.parallel else cut)

    def mlp_half(self, cut: Tensor) -> Tensor:
        """cut -> o [..., d]: the MLP branch joined to v, through the layer's own modules and their hooks."""
        out = self.branch(cut)
        if self.post_norm is not None:
            out = self.post_norm(out)
        v = self.residual(cut)
        return v + out.reshape(v.shape)

    def hidden(self, cut: Tensor) -> Tensor:
        """cut -> what `mlp_out` reads, [..., f] (h) or, of a mixture of experts, [..., d] (z)."""
        return self.mlp_half_and_hidden(cut)[1]

    def mlp_half_and_hidden(self, cut: Tensor) -> tuple[Tensor, Tensor]:
        """Both `mlp_half` and `hidden`, in one pass."""
        seen: list[Tensor] = []
        reader = self.layer.get_submodule(self.reader)
        handle = reader.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            out = self.mlp_half(cut)
        finally:
            handle.remove()
        return out, seen[0].reshape(*cut.shape[:-1], -1)

    def branch(self, cut: Tensor) -> Tensor:
        """cut -> the output of the MLP, before any post-norm, as [b, T, d]: experts take and give nothing less."""
        z = self.normed(cut)
        out = self.mlp(z if z.ndim == 3 else z.reshape(1, -1, z.shape[-1]))
        return out[0] if isinstance(out, tuple) else out


def linear_of(parent: nn.Module, name: str) -> nn.Module:
    """The linear layer `name` of `parent`; ModelFormatError if it is something else (quantised, for instance)."""
    linear = parent.get_submodule(name)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise ModelFormatError(
            "not a linear layer",
            field=name,
            got=type(linear).__name__,
            wanted="torch.nn.Linear",
            fix="load it in float32",
        )
    return linear


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], a view on it: GPT-2's Conv1D stores [in, out]."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


def blocks_of(model: nn.Module, adapter: Adapter | None = None) -> list[Block]:
    """The blocks of a transformers causal language model, in order; by default as its own adapter sees them."""
    adapter = adapter or adapter_for(model.config.model_type)  # type: ignore[union-attr, arg-type]
    return [Block(layer, adapter, i) for i, layer in enumerate(model.get_submodule(adapter.layers).children())]


def kv_shape(config: Any) -> tuple[int, int]:
    """Heads and head size of one layer's keys and values."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, head_dim


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
        # GPT-2 passes some of them by position; every later call passes them by name.
        given = inspect.signature(self.original[0].forward).bind_partial(x, *args).arguments
        self.x, self.kwargs = x, {**dict(list(given.items())[1:]), **kwargs}
        return (x,) if self.returns_tuple else x


def layer_inputs(model: nn.Module, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the model gives its layers: the embeddings x [b, T, d] and each layer's keyword arguments.

    Args:
        model: a transformers causal language model.
        input_ids: [b, T].
        inputs: what else the model is called with: an attention mask, and a KV prefix's cache if there is one.

    The model's own forward runs with every layer replaced by a recorder, so masks, position embeddings and embedding
    scales are transformers' own.
    """
    adapter = adapter_for(model.config.model_type)  # type: ignore[union-attr, arg-type]
    layers = model.get_submodule(adapter.layers)
    recorders = [_Recorder(layer, adapter.returns_tuple) for layer in layers.children()]
    model.set_submodule(adapter.layers, nn.ModuleList(recorders))
    try:
        with torch.no_grad():
            model.base_model(input_ids=input_ids, **inputs)  # type: ignore[operator]
    finally:
        model.set_submodule(adapter.layers, layers)
    assert recorders[0].x is not None
    return recorders[0].x, [recorder.kwargs for recorder in recorders]


def plain_inputs(attention_mask: Tensor) -> dict[str, Any]:
    """What a model is called with besides ids that nothing is in front of, for a mask [b, T]."""
    return {"attention_mask": attention_mask, "use_cache": False}

"""A patch applied to a transformers model, by forward hooks: the torch twin of the slots of the exported graph.

gate, up, q, k, v, o, down, ...   y + (input a) b + bias    on that linear layer's output
mlp_out                           y + (h a) b + bias        on the MLP branch, after any post-norm; z for h of experts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_runtime.patch import Patch

from .adapters import Block, blocks_of


@dataclass(frozen=True)
class TorchDelta:
    """The update of one slot: a [in, rank], b [rank, out], bias [out], mean fitted input [in]; some may be absent.

    `retained` is known of a fitted pair: the share of the map's energy tr M (G + l I) M^T that its rank keeps.
    """

    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    mean: Tensor | None = None
    retained: float | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """What the slot adds, for inputs [..., in]."""
        bias = inputs.new_zeros(()) if self.bias is None else self.bias
        if self.a is None or self.b is None:
            return bias
        return (inputs @ self.a) @ self.b + bias


@contextmanager
def applied(block: Block, deltas: Mapping[str, TorchDelta]) -> Iterator[None]:
    """Within the context the block's modules compute with `deltas` (site -> delta) added."""
    with ExitStack() as stack:
        for site, delta in deltas.items():
            if site == "mlp_out":
                _apply_after_branch(block, delta, stack)
            else:
                linear = block.layer.get_submodule(block.linears[site])
                handle = linear.register_forward_hook(lambda _m, args, out, d=delta: out + d(args[0]))
                stack.callback(handle.remove)
        yield


def _apply_after_branch(block: Block, delta: TorchDelta, stack: ExitStack) -> None:
    """`mlp_out` reads the input of the block's reader and adds to the output of its tail."""
    hidden: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden[:] = args

    def add(_module: nn.Module, _args: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # experts hand their routing back beside it
            return (out[0] + delta(hidden.pop()), *out[1:])
        return out + delta(hidden.pop())

    stack.callback(block.layer.get_submodule(block.reader).register_forward_pre_hook(keep).remove)
    stack.callback(block.layer.get_submodule(block.tail).register_forward_hook(add).remove)


def torch_deltas(patch: Patch, layer: int, device: torch.device | str, dtype: torch.dtype) -> dict[str, TorchDelta]:
    """The tensors of a patch file for one layer, site -> delta."""

    def tensor(array: Any) -> Any:
        return None if array is None else torch.tensor(array, device=device, dtype=dtype)

    return {
        site: TorchDelta(tensor(delta.bias), tensor(delta.a), tensor(delta.b))
        for (index, site), delta in patch.deltas.items()
        if index == layer
    }


@contextmanager
def patched(model: nn.Module, patch: Patch) -> Iterator[None]:
    """Within the context `model` runs with `patch` applied."""
    weight = next(model.parameters())
    with ExitStack() as stack:
        for block in blocks_of(model):
            # A device map may have put layers elsewhere; the weights of an offloaded layer are nowhere right now.
            own = next(block.layer.parameters()).device
            device = weight.device if own.type == "meta" else own
            stack.enter_context(applied(block, torch_deltas(patch, block.index, device, weight.dtype)))
        yield

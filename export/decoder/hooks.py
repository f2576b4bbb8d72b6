"""Apply a patch to a transformers model with forward hooks, which compute the same as the slots of the exported graph.

    gate, up, q, k, v, o, down, ...   y + (input a) b + bias    added to the output y of that linear layer
    mlp_out                           y + (h a) b + bias        added to the MLP branch's output y, after any post-norm

In a mixture of experts, `mlp_out` reads z instead of h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_runtime.patch import Delta, Patch

from .adapters import Block, blocks_of


@dataclass(frozen=True)
class TorchDelta:
    """The update of one slot; every part may be absent.

    Attributes:
        bias: the bias, [out].
        a: the first factor, [in, rank].
        b: the second factor, [rank, out].
        mean: the mean of the fitted inputs, [in].
        retained: the share of the map's energy tr M (G + l I) M^T that the rank keeps; known for fitted pairs only.
    """

    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    mean: Tensor | None = None
    retained: float | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what the slot adds, [..., out], for inputs [..., in]."""
        bias = inputs.new_zeros(()) if self.bias is None else self.bias
        if self.a is None or self.b is None:
            return bias
        return (inputs @ self.a) @ self.b + bias


@contextmanager
def applied(
    block: Block, deltas: Mapping[str, TorchDelta], enabled: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Add `deltas` (site -> delta) to the outputs of the block's modules within the context, if `enabled()` is true."""
    with ExitStack() as stack:
        for site, delta in deltas.items():
            if site == "mlp_out":
                _apply_after_branch(block, delta, enabled, stack)
            else:
                _apply_to_linear(block.layer.get_submodule(block.linears[site]), delta, enabled, stack)
        yield


def _apply_to_linear(linear: nn.Module, delta: TorchDelta, enabled: Callable[[], bool], stack: ExitStack) -> None:
    def add(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + delta(args[0]) if enabled() else out

    stack.callback(linear.register_forward_hook(add).remove)


def _apply_after_branch(block: Block, delta: TorchDelta, enabled: Callable[[], bool], stack: ExitStack) -> None:
    """Add the delta of `mlp_out`, which reads the input of the block's reader, to the output of the block's tail."""
    hidden: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden[:] = args if enabled() else ()

    def add(_module: nn.Module, _args: Any, out: Any) -> Any:
        if not enabled():
            return out
        if isinstance(out, tuple):  # a mixture of experts also returns its routing
            return (out[0] + delta(hidden.pop()), *out[1:])
        return out + delta(hidden.pop())

    stack.callback(block.layer.get_submodule(block.reader).register_forward_pre_hook(keep).remove)
    stack.callback(block.layer.get_submodule(block.tail).register_forward_hook(add).remove)


class PatchHooks:
    """A patch on a transformers model, whose tensors are uploaded once and whose hooks are switched on and off.

    Use it as a context manager: it registers the hooks once and removes them when the context ends. Within the context
    the model runs without the patch, except inside `on()`, so that several patches can be measured on one model without
    uploading any of them twice.

    Args:
        model: a transformers causal language model with an adapter.
        patch: the patch to apply. Its KV prefix, if it has one, is not applied here (kv_prefix.py).
    """

    def __init__(self, model: nn.Module, patch: Patch) -> None:
        self._model, self._patch = model, patch
        self._on = False
        self._without: int | None = None
        self._stack = ExitStack()

    def __enter__(self) -> PatchHooks:
        weight = next(self._model.parameters())
        layers: dict[int, dict[str, Delta]] = {}
        for (layer, site), delta in self._patch.deltas.items():
            layers.setdefault(layer, {})[site] = delta
        with ExitStack() as stack:
            for block in blocks_of(self._model):
                # A device map may place layers on other devices; an offloaded layer's weights are on the meta device.
                own = next(block.layer.parameters()).device
                device = weight.device if own.type == "meta" else own
                deltas = {
                    site: torch_delta(delta, device, weight.dtype)
                    for site, delta in layers.get(block.index, {}).items()
                }
                stack.enter_context(applied(block, deltas, partial(self._enabled, block.index)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @contextmanager
    def on(self, without_layer: int | None = None) -> Iterator[None]:
        """Within the context the model runs with the patch, except in `without_layer` if that is given."""
        self._on, self._without = True, without_layer
        try:
            yield
        finally:
            self._on = False

    def _enabled(self, layer: int) -> bool:
        return self._on and layer != self._without


def torch_delta(delta: Delta, device: torch.device | str, dtype: torch.dtype) -> TorchDelta:
    """Return the delta of one slot as tensors on a device."""

    def tensor(array: Any) -> Any:
        return None if array is None else torch.tensor(array, device=device, dtype=dtype)

    return TorchDelta(tensor(delta.bias), tensor(delta.a), tensor(delta.b))


def layer_deltas(patch: Patch, model: Any) -> dict[int, dict[str, TorchDelta]]:
    """Return the deltas of a patch by layer and site, as tensors on the model's device and in its dtype."""
    layers: dict[int, dict[str, TorchDelta]] = {}
    for (layer, site), delta in patch.deltas.items():
        layers.setdefault(layer, {})[site] = torch_delta(delta, model.device, model.dtype)
    return layers


@contextmanager
def patched(model: nn.Module, patch: Patch) -> Iterator[None]:
    """Apply the deltas of `patch` to `model` within the context."""
    with PatchHooks(model, patch) as hooks, hooks.on():
        yield

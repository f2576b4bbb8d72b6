"""Patch slots inside a torch model: modules put beside the patched linears while the graph is exported.

The tensors a [rows, in, rank], b [rank, out] and bias of each slot come from outside, as inputs of the traced forward,
so that they leave torch as named graph inputs with a symbolic rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from tp_runtime.folder import Slot

from .adapters import Block, blocks_of

SLOT_SETS: Mapping[str, tuple[str, ...]] = {
    "output": ("mlp_out",),
    "mlp": ("gate", "up", "mlp_out"),
    "all": ("q", "k", "v", "o", "gate", "up", "down", "mlp_out"),
}


@dataclass
class SlotTensors:
    """The three inputs of one slot: a [rows, in, rank], b [rows, rank, out], bias [rows, 1, out]."""

    a: Tensor
    b: Tensor
    bias: Tensor

    def add(self, out: Tensor, inputs: Tensor) -> Tensor:
        """out [batch, T, out] plus (inputs a) b + bias."""
        return out + ((inputs @ self.a) @ self.b + self.bias)


class _Slotted(nn.Module):
    """A linear with a slot beside it."""

    def __init__(self, linear: nn.Module, slot: SlotTensors) -> None:
        super().__init__()
        self.linear, self.slot = linear, slot

    def forward(self, x: Tensor) -> Tensor:
        return self.slot.add(self.linear(x), x)


class _Reader(nn.Module):
    """Wraps `down` and keeps its input h for the slot after the branch."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.hidden: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        self.hidden = h
        return self.down(h)


class _BranchEnd(nn.Module):
    """Wraps the last module of the MLP branch and adds the `mlp_out` slot, which reads h, to what it returns."""

    def __init__(self, tail: nn.Module, reader: _Reader, slot: SlotTensors) -> None:
        super().__init__()
        self.tail, self.slot = tail, slot
        self.reader = [reader]  # in a list: the reader is already a submodule elsewhere

    def forward(self, x: Tensor) -> Tensor:
        out = self.tail(x)
        hidden = self.reader[0].hidden
        assert hidden is not None
        return self.slot.add(out, hidden)


def slots_of(model: nn.Module, slot_set: str) -> list[Slot]:
    """The slots of `model`, layer by layer, for one of SLOT_SETS."""
    slots = []
    for block in blocks_of(model):
        linears = block.adapter.linears()
        for site in SLOT_SETS[slot_set]:
            linear = block.down if site == "mlp_out" else block.layer.get_submodule(linears[site])
            outputs, inputs = linear.weight.shape  # type: ignore[union-attr, misc]
            slots.append(Slot(block.index, site, int(inputs), int(outputs)))
    return slots


@contextmanager
def slotted(model: nn.Module, tensors: Mapping[tuple[int, str], SlotTensors]) -> Iterator[None]:
    """Within the context the layers of `model` carry slots, computing with `tensors` (layer, site) -> inputs."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(block: Block, name: str, new: nn.Module) -> None:
        undo.append((block.layer, name, block.layer.get_submodule(name)))
        block.layer.set_submodule(name, new)

    blocks = blocks_of(model)
    try:
        for (layer, site), slot in tensors.items():
            block = blocks[layer]
            adapter = block.adapter
            if site == "mlp_out":
                continue
            name = adapter.linears()[site]
            replace(block, name, _Slotted(block.layer.get_submodule(name), slot))
        for (layer, site), slot in tensors.items():
            if site != "mlp_out":
                continue
            block = blocks[layer]
            adapter = block.adapter
            reader = _Reader(block.layer.get_submodule(adapter.down))
            if adapter.post_norm is None:
                replace(block, adapter.down, _BranchEnd(reader, reader, slot))
            else:
                replace(block, adapter.down, reader)
                replace(
                    block, adapter.post_norm, _BranchEnd(block.layer.get_submodule(adapter.post_norm), reader, slot)
                )
        yield
    finally:
        for layer_module, name, original in reversed(undo):
            layer_module.set_submodule(name, original)

"""Put patch slots into a torch model: modules that add to the outputs of linear layers while the graph is exported.

The tensors a [rows, in, rank], b [rows, rank, out] and bias of each slot are inputs of the traced forward, so the graph
has them as named inputs with a symbolic rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tp_runtime.patch import SlotKey
from tp_runtime.session import Slot

from .adapters import Block, blocks_of, weight_of

# The sites of a block that get a slot. Their names depend on the architecture: phi3 has one `gate_up`.
SLOT_SETS: Mapping[str, Callable[[Block], tuple[str, ...]]] = {
    "output": lambda block: ("mlp_out",),
    "mlp": lambda block: (*(site for site in block.adapter.reads_z if site in block.linears), "mlp_out"),
    "all": lambda block: (*block.linears, "mlp_out"),
}


@dataclass
class SlotTensors:
    """The three inputs of one slot.

    Attributes:
        a: the first factor, [rows, in, rank].
        b: the second factor, [rows, rank, out].
        bias: the bias, [rows, 1, out].
    """

    a: Tensor
    b: Tensor
    bias: Tensor

    def add(self, out: Tensor, inputs: Tensor) -> Tensor:
        """Return out + (inputs a) b + bias, for out [batch, T, out] and inputs [batch, T, in]."""
        return out + ((inputs @ self.a) @ self.b + self.bias)


class _Slotted(nn.Module):
    """A linear layer with a slot that is added to its output."""

    def __init__(self, linear: nn.Module, slot: SlotTensors) -> None:
        super().__init__()
        self.linear, self.slot = linear, slot

    def forward(self, x: Tensor) -> Tensor:
        return self.slot.add(self.linear(x), x)


class _Reader(nn.Module):
    """Wraps the block's reader (`down`, or a mixture of experts) and keeps its input for the `mlp_out` slot."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader
        self.hidden: Tensor | None = None

    def forward(self, h: Tensor) -> Any:
        self.hidden = h
        return self.reader(h)


class _BranchEnd(nn.Module):
    """Wraps the last module of the MLP branch and adds the `mlp_out` slot to its output."""

    def __init__(self, tail: nn.Module, reader: _Reader, slot: SlotTensors) -> None:
        super().__init__()
        self.tail, self.slot = tail, slot
        self.reader = [reader]  # in a list: the reader is already a submodule elsewhere

    def forward(self, x: Tensor) -> Any:
        out = self.tail(x)
        hidden = self.reader[0].hidden
        assert hidden is not None
        if isinstance(out, tuple):  # a mixture of experts also returns its routing
            return (self.slot.add(out[0], hidden), *out[1:])
        return self.slot.add(out, hidden)


def slots_of(model: nn.Module, slot_set: str) -> list[Slot]:
    """Return the slots of `model` in the order of its layers; `slot_set` is one of SLOT_SETS."""
    return [
        Slot(block.index, site, *_sizes(block, site))
        for block in blocks_of(model)
        for site in SLOT_SETS[slot_set](block)
    ]


def _sizes(block: Block, site: str) -> tuple[int, int]:
    """Return the sizes of a slot's input and output."""
    if site != "mlp_out":
        outputs, inputs = weight_of(block.layer.get_submodule(block.linears[site])).shape
        return inputs, outputs
    width, inner = weight_of(block.mlps[0].down).shape
    return (width if block.router is not None else inner), width


@contextmanager
def slotted(model: nn.Module, tensors: Mapping[SlotKey, SlotTensors]) -> Iterator[None]:
    """Put slots into the layers of `model` within the context; `tensors` maps (layer, site) to the slot's inputs."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(block: Block, name: str, new: nn.Module) -> None:
        undo.append((block.layer, name, block.layer.get_submodule(name)))
        block.layer.set_submodule(name, new)

    blocks = blocks_of(model)
    try:
        for (layer, site), slot in tensors.items():
            if site != "mlp_out":
                name = blocks[layer].linears[site]
                replace(blocks[layer], name, _Slotted(blocks[layer].layer.get_submodule(name), slot))
        for (layer, site), slot in tensors.items():
            if site != "mlp_out":
                continue
            block = blocks[layer]
            reader = _Reader(block.layer.get_submodule(block.reader))
            if block.tail == block.reader:
                replace(block, block.reader, _BranchEnd(reader, reader, slot))
            else:
                tail = block.layer.get_submodule(block.tail)
                replace(block, block.reader, reader)
                replace(block, block.tail, _BranchEnd(tail, reader, slot))
        yield
    finally:
        for layer_module, name, original in reversed(undo):
            layer_module.set_submodule(name, original)

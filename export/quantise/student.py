"""The student of a quantised export, in torch: the base model with the weights that the graph will compute with.

The weights after quantisation are known exactly (Blocks.dequantised), so teacher and student can be one model whose
weights are swapped. Activations stay in float32. The graph rounds them to int8 as well; that is the smaller part of the
loss, and patches do not compensate it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tp_runtime.patch import fitted_precision

from ..decoder import Block, blocks_of, weight_of
from ..progress import bar
from .blocks import BLOCK, Blocks, FloatArray
from .calibrated import head_hessian, quantise_layers
from .precision import Precision, quantised


class QuantisedStudent:
    """The dequantised weights of a model, which replace its float32 weights within a context.

    Args:
        model: the model in float32.
        name: the name of the quantised precision.
        blocks: the blocks of each weight, by the id of the parameter.

    Attributes:
        name: the name of the quantised precision.
        precision: the precision that patches fitted for this student name.
    """

    def __init__(self, model: nn.Module, name: str, blocks: Mapping[int, Blocks]) -> None:
        self.name, self.precision = name, fitted_precision(name)
        self._blocks: dict[str, Blocks] = {}  # by the name of the parameter
        self._weights: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the id of the parameter
        for name, module in _matrices(model, float_weights(model)).items():
            self._blocks[name] = own = blocks[id(module.weight)]
            self._weights[id(module.weight)] = module.weight, _weight(module, own)

    @classmethod
    def of(cls, model: nn.Module, precision: Precision, texts: Sequence[Sequence[int]] = ()) -> QuantisedStudent:
        """Quantise a model.

        Args:
            model: the model in float32.
            precision: the quantised precision.
            texts: the ids of the texts that a calibrated precision is calibrated on.
        """
        head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        matrices = _matrices(model, float_weights(model))
        with bar(f"quantise to {precision.name}", len(matrices), "weight") as shown:
            found: dict[int, Blocks] = {}
            if precision.calibrated is not None:
                ends = {
                    id(m.weight): m for m in (head, table) if any(m.weight is own.weight for own in matrices.values())
                }
                for key, module in ends.items():
                    if precision.calibrated_head is not None and key == id(head.weight):
                        hessian = head_hessian(model, texts).cpu()
                        found[key] = precision.calibrate_head(_matrix(module), hessian)
                    else:
                        found[key] = precision.quantise(_matrix(module), is_head=True)
                swapped = [(module.weight, _weight(module, found[key])) for key, module in ends.items()]
                shown.update(len(ends))
                found |= quantise_layers(
                    model, texts, precision.calibrate, partial(_swapped, swapped), progress=shown.update
                )
            for module in matrices.values():
                if id(module.weight) not in found:
                    is_head = module is head or module is table
                    found[id(module.weight)] = precision.quantise(_matrix(module), is_head=is_head)
                    shown.update()
        return cls(model, precision.name, found)

    @property
    def blocks(self) -> Mapping[str, Blocks]:
        """The blocks of each weight, by the name of the parameter."""
        return self._blocks

    @property
    def weights_digest(self) -> str | None:
        """The SHA-256 of all blocks, 64 hex digits; None for a precision that is not calibrated."""
        if quantised(self.name).calibrated is None:
            return None
        digest = hashlib.sha256()
        for name, blocks in sorted(self._blocks.items()):
            digest.update(f"{name} {blocks.bits} {blocks.inputs}".encode())
            for part in (blocks.packed, blocks.scales, blocks.zero_points):
                digest.update(b"none" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make the whole model the student within the context."""
        with _swapped(self._weights.values()):
            yield

    @contextmanager
    def layer(self, block: Block) -> Iterator[None]:
        """Give `block` the student's weights within the context."""
        pairs = [self._weights[id(weight)] for weight in block.layer.parameters() if id(weight) in self._weights]
        with _swapped(pairs):
            yield


@contextmanager
def _swapped(pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give each parameter its new values within the context."""
    before = []
    for weight, found in pairs:
        before.append((weight, weight.data))
        weight.data = found
    try:
        yield
    finally:
        for weight, original in before:
            weight.data = original


def _matrix(module: Any) -> FloatArray:
    """Return the weight of a linear layer, [in, out], or of the embedding table, [width, tokens]."""
    return np.ascontiguousarray(weight_of(module).data.T.float().cpu().numpy())


def _weight(module: Any, blocks: Blocks) -> Tensor:
    """Return the dequantised weight in the form, the dtype and on the device of the module's own."""
    found = torch.from_numpy(blocks.dequantised()).to(module.weight)
    return found if isinstance(module, Conv1D) else found.T.contiguous()


def as_student(student: QuantisedStudent | None) -> AbstractContextManager[None]:
    """Return `student.whole()`; if `student` is None, it has the teacher's weights and the context changes nothing."""
    return nullcontext() if student is None else student.whole()


def float_weights(model: nn.Module) -> set[str]:
    """Return the names of the matrices that stay in float32: routers, whose few rows decide which experts run."""
    routers = {id(block.router) for block in blocks_of(model) if block.router is not None}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in routers}


def _matrices(model: nn.Module, kept: set[str]) -> dict[str, Any]:
    """Return the linear layers and the embedding table, by the name of the weight, each weight once.

    A table whose rows end within a block stays in float32, because no operator looks up such rows.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    if table.weight.shape[1] % BLOCK:
        table = None
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear | Conv1D) or module is table) and f"{name}.weight" not in kept:
            found.setdefault(id(module.weight), (f"{name}.weight", module))
    return dict(found.values())


def token_kl(wanted: Tensor, got: Tensor) -> Tensor:
    """Return the KL divergence [T] of log probabilities `got` [T, vocab] from `wanted`, in nats."""
    return (wanted.exp() * (wanted - got)).sum(-1)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log probabilities [T, vocab] of the next token after each of `ids` [1, T]."""
    return model(ids, use_cache=False).logits[0].log_softmax(-1)

"""The student of a quantised export, in torch: the base model with the weights that the graph will compute with.

What quantisation does to a weight is known exactly (quantise.Blocks.dequantised), so teacher and student can be one
model whose weights are swapped. Activations stay in float32; the graph rounds them to int8 as well, which is the
smaller part of the loss and no patch's matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import FLOAT_PRECISIONS

from ..decoder import Block, blocks_of, weight_of
from ..progress import bar
from ..source import Source
from .precision import Precision, held_out_text, quantised, resolve


class QuantisedStudent:
    """Dequantised weights of a model, put in place for as long as a context lasts.

    Args:
        model: in float32.
        precision: a quantised one.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.precision = precision.name
        self._weights: dict[str, tuple[nn.Parameter, Tensor]] = {}
        head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        kept = float_weights(model)
        matrices = _matrices(model, kept)
        with bar(f"quantise to {precision.name}", len(matrices), "weight") as shown:
            for name, module in matrices:
                matrix = weight_of(module).data.T  # [in, out]; of a table [width, tokens]
                array = np.ascontiguousarray(matrix.float().cpu().numpy())
                blocks = precision.quantise(array, is_head=module is head or module is table)
                found = torch.from_numpy(blocks.dequantised()).to(module.weight)
                self._weights[name] = module.weight, found if isinstance(module, Conv1D) else found.T.contiguous()
                shown.update()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context the model is the student."""
        with self._swapped(self._weights):
            yield

    @contextmanager
    def layer(self, block: Block) -> Iterator[None]:
        """Within the context this block is the student's."""
        own = {id(parameter) for parameter in block.layer.parameters()}
        with self._swapped([name for name, (weight, _q) in self._weights.items() if id(weight) in own]):
            yield

    @contextmanager
    def _swapped(self, names: Iterable[str]) -> Iterator[None]:
        pairs = [self._weights[name] for name in names]
        before = [weight.data for weight, _found in pairs]
        for weight, found in pairs:
            weight.data = found
        try:
            yield
        finally:
            for (weight, _found), original in zip(pairs, before, strict=True):
                weight.data = original


def as_student(student: QuantisedStudent | None) -> AbstractContextManager[None]:
    """`student.whole()`, or a context that changes nothing where the student has the teacher's weights."""
    return nullcontext() if student is None else student.whole()


def float_weights(model: nn.Module) -> set[str]:
    """Names of matrices that stay in float32: routers, whose few rows decide which expert answers."""
    routers = {id(block.router) for block in blocks_of(model) if block.router is not None}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in routers}


def _matrices(model: nn.Module, kept: set[str]) -> list[tuple[str, Any]]:
    """The modules whose weights the graph holds in blocks, each once: the linear layers, and the table of tokens."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear | Conv1D) or module is table) and f"{name}.weight" not in kept:
            found.setdefault(id(module.weight), (f"{name}.weight", module))
    return list(found.values())


def student_of(source: Source, model: nn.Module, precision: str) -> QuantisedStudent:
    """The student in a precision; `int4` takes the quantiser that loses least on held-out text.

    Raises:
        CalibrationError: a float precision: it has no loss to repair.
        ModelFormatError: unknown precision.
    """
    name = measured_precision(source, model, precision)
    if name in FLOAT_PRECISIONS:
        raise CalibrationError(
            "not a quantised precision", field="student_precision", got=precision, wanted="int8, int4 or int4-..."
        )
    return QuantisedStudent(model, quantised(name))


def measured_precision(source: Source, model: nn.Module, precision: str) -> str:
    """The precision, with `int4` resolved by measuring each of its quantisers."""

    @cache  # the float32 side, once, and only where there is something to choose
    def held_out() -> tuple[Tensor, Tensor]:
        window = model.config.get_text_config().max_position_embeddings  # type: ignore[union-attr, operator]
        ids = source.codec.render(held_out_text(), raw=True)[:window]
        text = torch.tensor([ids], device=next(model.parameters()).device)
        return text, log_probabilities(model, text)

    def loss(candidate: Precision) -> float:
        text, reference = held_out()
        with QuantisedStudent(model, candidate).whole():
            return float((reference.exp() * (reference - log_probabilities(model, text))).sum(-1).mean())

    return resolve(precision, loss)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """[T, vocab] of ids [1, T]."""
    return model(ids, use_cache=False).logits[0].log_softmax(-1)

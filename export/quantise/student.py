"""The student of a quantised export, in torch: the base model with the weights that the graph will compute with.

The weights after quantisation are known exactly (Blocks.dequantised), so teacher and student can be one model whose
weights are swapped. Activations stay in float32. The graph rounds them to int8 as well; that is the smaller part of the
loss, and patches do not compensate it.
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
from tp_runtime.patch import FLOAT_PRECISIONS, fitted_precision

from ..decoder import Block, blocks_of, weight_of
from ..progress import bar
from ..source import Source
from .precision import Precision, held_out_text, quantised, resolve


class QuantisedStudent:
    """The dequantised weights of a model, which replace its float32 weights within a context.

    Args:
        model: the model in float32.
        precision: the quantised precision of the student.

    Attributes:
        precision: the precision that patches fitted for this student name.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.precision = fitted_precision(precision.name)
        self._weights: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the id of the parameter
        head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        kept = float_weights(model)
        matrices = _matrices(model, kept)
        with bar(f"quantise to {precision.name}", len(matrices), "weight") as shown:
            for module in matrices:
                matrix = weight_of(module).data.T  # [in, out]; [width, tokens] for the embedding table
                array = np.ascontiguousarray(matrix.float().cpu().numpy())
                blocks = precision.quantise(array, is_head=module is head or module is table)
                found = torch.from_numpy(blocks.dequantised()).to(module.weight)
                own = found if isinstance(module, Conv1D) else found.T.contiguous()
                self._weights[id(module.weight)] = module.weight, own
                shown.update()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make the whole model the student within the context."""
        with self._swapped(weight for weight, _found in self._weights.values()):
            yield

    @contextmanager
    def layer(self, block: Block) -> Iterator[None]:
        """Give `block` the student's weights within the context."""
        with self._swapped(block.layer.parameters()):
            yield

    @contextmanager
    def _swapped(self, weights: Iterable[nn.Parameter]) -> Iterator[None]:
        pairs = [self._weights[id(weight)] for weight in weights if id(weight) in self._weights]
        before = [weight.data for weight, _found in pairs]
        for weight, found in pairs:
            weight.data = found
        try:
            yield
        finally:
            for (weight, _found), original in zip(pairs, before, strict=True):
                weight.data = original


def as_student(student: QuantisedStudent | None) -> AbstractContextManager[None]:
    """Return `student.whole()`; if `student` is None, it has the teacher's weights and the context changes nothing."""
    return nullcontext() if student is None else student.whole()


def float_weights(model: nn.Module) -> set[str]:
    """Return the names of the matrices that stay in float32: routers, whose few rows decide which experts run."""
    routers = {id(block.router) for block in blocks_of(model) if block.router is not None}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in routers}


def _matrices(model: nn.Module, kept: set[str]) -> list[Any]:
    """Return the linear layers and the embedding table, each weight once: the graph stores these in blocks."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear | Conv1D) or module is table) and f"{name}.weight" not in kept:
            found.setdefault(id(module.weight), module)
    return list(found.values())


def student_of(source: Source, model: nn.Module, precision: str) -> QuantisedStudent:
    """Return the student in a precision; `int4` stands for the quantiser that loses least, as in an export.

    Raises:
        CalibrationError: the precision is a float precision, which has no loss to repair.
        ModelFormatError: the precision is unknown.
    """
    name = measured_precision(source, model, precision)
    if name in FLOAT_PRECISIONS:
        raise CalibrationError(
            "the student's precision is not quantised",
            field="student_precision",
            got=precision,
            wanted="int8, int4, int4-fp16 or int4-...",
        )
    return QuantisedStudent(model, quantised(name))


def measured_precision(source: Source, model: nn.Module, precision: str) -> str:
    """Return `precision`; for one of MEASURED, measure each quantiser and return the precision of the best one.

    Raises:
        ModelFormatError: the precision is unknown.
    """

    @cache  # the float32 model runs once, and only if there is a choice
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
    """Return the log probabilities [T, vocab] of the next token after each of `ids` [1, T]."""
    return model(ids, use_cache=False).logits[0].log_softmax(-1)

"""Quantise a model's layers on calibration texts, each layer behind the quantised ones below it.

Two copies of each text advance through the blocks. The teacher's has the float32 weights, the student's the weights
that are quantised so far. Within a block the linear layers are quantised in the order in which they run, so the rows
that each of them is calibrated on already contain the errors of all those before it.

The student's rows x differ from the teacher's rows y, because of the errors below. So a layer's weight W is first
replaced by the one that brings the products with x closest to y W, a ridge regression, and then rounded (Li et al.,
GPTAQ, arXiv:2504.02692). Experts have no such step: teacher and student may choose other experts for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..decoder import Block, blocks_of, decoder_of, layer_inputs, plain_inputs, weight_of
from ..inverse_factor import damped
from .blocks import Blocks, FloatArray

# The ridge of the regression towards the teacher's products, relative to the mean of the Hessian's diagonal. With less,
# the layers follow the calibration texts more closely, and texts of other kinds lose more (docs/precision.md).
_RIDGE = 0.4

Calibrated = Callable[[FloatArray, Tensor], Blocks]


class _Stopped(Exception):
    """Stops a layer when the rows of the stage are known."""


@dataclass
class _Text:
    """The hidden states [1, T, d] of one calibration text, and the layers' other arguments."""

    teacher: Tensor
    student: Tensor
    kwargs: Sequence[Mapping[str, Any]]


@dataclass
class _Group:
    """Linear layers that read the same rows.

    Attributes:
        linears: the layers.
        hessian: the sum of x x^T over the student's rows x, [K, K].
        shift: the sum of x (y - x)^T with the teacher's rows y, [K, K]; None if the rows do not belong together.
        rows: the teacher's rows of each text, [T, K].
    """

    linears: Sequence[Any]
    hessian: Tensor
    shift: Tensor | None
    rows: list[Tensor]


@torch.no_grad()
def quantise_layers(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    quantise: Calibrated,
    as_student: Callable[[], Any],
    progress: Callable[[int], None] = lambda linears: None,
) -> dict[int, Blocks]:
    """Quantise the linear layers of all blocks; the model's weights are the same afterwards.

    Args:
        model: the model in float32.
        texts: the ids of the calibration texts.
        quantise: the quantiser of a weight [K, N] with the Hessian [K, K] of its rows.
        as_student: returns a context within which the embedding table is the student's.
        progress: a function that is called with the number of linear layers just quantised.

    Returns:
        The blocks, by the id of the parameter.
    """
    found: dict[int, Blocks] = {}
    device = next(model.parameters()).device
    inputs = [torch.tensor([list(ids)], device=device) for ids in texts]
    teachers = [layer_inputs(model, ids, plain_inputs(torch.ones_like(ids))) for ids in inputs]
    with as_student():
        students = [layer_inputs(model, ids, plain_inputs(torch.ones_like(ids)))[0] for ids in inputs]
    running = [_Text(t, s, kwargs) for (t, kwargs), s in zip(teachers, students, strict=True)]
    for block in blocks_of(model):
        stages = _stages(block)
        before = [(linear, linear.weight.data) for groups in stages for group in groups for linear in group.linears]
        try:
            _run_teachers(block, stages, running)
            for groups in stages:
                _collect(block, groups, running)
                for group in groups:
                    for linear in group.linears:
                        blocks = quantise(_wanted(weight_of(linear), group), group.hessian.cpu())
                        found[id(linear.weight)] = blocks
                        _assign(linear, blocks)
                        progress(1)
            for text in running:
                text.student = _run(block, text.student, text.kwargs[block.index])
        finally:
            for linear, weight in before:
                linear.weight.data = weight
    return found


@torch.no_grad()
def head_hessian(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the sum of x x^T over the rows x that the float32 model's head reads on the texts, [K, K].

    The head is quantised first, because the layers are calibrated behind its tied table. So its rows are those of the
    float32 model, without the layers' errors.
    """
    device = next(model.parameters()).device
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    hessian = torch.zeros(width, width, device=device)
    for text in texts:
        ids = torch.tensor([list(text)], device=device)
        rows = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        hessian += rows.T @ rows
    return hessian


def _stages(block: Block) -> list[list[_Group]]:
    """Return the linear layers of a block in the order in which they run, those that read the same rows together."""
    attention: dict[str, Any] = {
        site: block.layer.get_submodule(name) for site, name in block.linears.items() if site in _ATTENTION
    }
    first = [linear for site, linear in attention.items() if site != "o"]
    stages: list[list[list[Any]]] = [[first], [[attention["o"]]]]
    stages.append([list(mlp.reads_z.values()) for mlp in block.mlps])
    stages.append([[mlp.down] for mlp in block.mlps])
    return [[_Group(linears, *_empty(linears[0], block), []) for linears in groups] for groups in stages]


_ATTENTION = ("q", "k", "v", "qkv", "o")


def _empty(linear: nn.Module, block: Block) -> tuple[Tensor, Tensor | None]:
    weight = weight_of(linear)
    zeros = weight.new_zeros(weight.shape[1], weight.shape[1])
    return zeros, None if block.router is not None else zeros.clone()


def _run_teachers(block: Block, stages: Sequence[Sequence[_Group]], texts: Sequence[_Text]) -> None:
    """Advance the teacher's texts and keep what each group reads."""
    groups = [group for stage in stages for group in stage if group.shift is not None]
    for text in texts:
        with _reading(groups, lambda group, rows: group.rows.append(rows)):
            text.teacher = _run(block, text.teacher, text.kwargs[block.index])


def _collect(block: Block, groups: Sequence[_Group], texts: Sequence[_Text]) -> None:
    """Sum over the student's rows of one stage."""
    for number, text in enumerate(texts):

        def add(group: _Group, rows: Tensor, number: int = number) -> None:
            group.hessian += rows.T @ rows
            if group.shift is not None:
                group.shift += rows.T @ (group.rows[number] - rows)
            if len(groups) == 1:
                raise _Stopped

        with _reading(groups, add), suppress(_Stopped):
            _run(block, text.student, text.kwargs[block.index])
    for group in groups:
        group.rows.clear()


@contextmanager
def _reading(groups: Sequence[_Group], read: Callable[[_Group, Tensor], None]) -> Iterator[None]:
    """Call `read` with a group and the rows [T, K] that it is about to read."""

    def hook(group: _Group) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: read(group, args[0].reshape(-1, args[0].shape[-1]))

    handles = [group.linears[0].register_forward_pre_hook(hook(group)) for group in groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(block: Block, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    out = block.layer(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _wanted(weight: Tensor, group: _Group) -> FloatArray:
    """Return the weight [K, N] whose products with the student's rows are closest to the teacher's products."""
    own = weight.T.double()
    if group.shift is not None:
        own = own + torch.linalg.solve(damped(group.hessian, _RIDGE), group.shift.double() @ own)
    return np.ascontiguousarray(own.float().cpu().numpy())


def _assign(linear: Any, blocks: Blocks) -> None:
    found = torch.from_numpy(blocks.dequantised()).to(linear.weight)
    linear.weight.data = found if isinstance(linear, Conv1D) else found.T.contiguous()

"""The forms of a static patch: closed-form regressions of one block's student onto its teacher.

Each form takes the completion rows of both sides at the cut between the block's halves (v_T and v_S, in parallel blocks
with the MLP's input beside them; row t of one aligned with row t of the other) and returns the deltas of this block.
Letters as in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tp_runtime.errors import CalibrationError

from ..decoder import Block, TorchDelta, applied, weight_of
from .lora_form import pre_norm_target
from .ridge import AffineMap, Moments, share_kept, top_directions

_ROWS = 2048


@dataclass(frozen=True)
class Rows:
    """What a form is fitted on at one block.

    Attributes:
        teacher: the teacher's cut, v_T [N, d] (v and u [N, 2d] in parallel blocks, adapters.py).
        student: the same of the student as already patched below.
        sink: the student's at position 0, the attention sink, whose direction is projected out of the maps; None where
            the student never runs that position, because a KV prefix stands in its place.
        as_student: a context within which the block has the student's weights, where they are not the teacher's.
    """

    teacher: Tensor
    student: Tensor
    sink: Tensor | None
    as_student: Callable[[], AbstractContextManager[None]] = nullcontext

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(teacher, student) a few rows at a time: what a block computes from a row is several times as wide."""
        yield from zip(self.teacher.split(_ROWS), self.student.split(_ROWS), strict=True)


@dataclass(frozen=True)
class Settings:
    """What the user chooses: rank of each pair, the relative ridge, the first block that is patched, and whether the
    `lora` form has a bias beside its pair.
    """

    rank: int = 16
    ridge: float = 1.0
    first_layer: int = 0
    bias: bool = True


Form = Callable[[Block, Rows, Settings], dict[str, TorchDelta]]


def check_method(method: str, blocks: Sequence[Block]) -> None:
    """Check that a form applies to a model.

    Raises:
        CalibrationError: `matrix` or `lora`, and a block is a mixture of experts: a row meets few of them, and each
            would need slots of its own.
    """
    for block in blocks:
        if method in ("matrix", "lora") and block.router is not None:
            raise CalibrationError(
                f"no {method} form for a mixture of experts",
                field="method",
                got=f"{len(block.mlps)} experts in layer {block.index}",
                wanted="one MLP",
                fix="use --method output or vector",
            )


def fit_vector(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Thought vector: the mean of o_T - o_S over the rows, a bias on the block's output."""
    sums = []
    for teacher, student in rows.parts():
        o_teacher = block.mlp_half(teacher)
        with rows.as_student():
            sums.append((o_teacher - block.mlp_half(student)).sum(0))
    return {"mlp_out": TorchDelta(bias=torch.stack(sums).sum(0) / len(rows.student))}


def fit_output(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """`output`: ridge of o_T - o_S on h_S, one low-rank pair and a bias after the MLP branch."""
    return _output(block, rows, settings, below={})


def fit_matrix(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """`matrix`: thought matrices W M on the linears that read z, one M for all, then `output` on what is left.

    M is the ridge of z_T - z_S on z_S. The pair is truncated in the metric of what gate and up output together,
    W M (G + l I) M^T W^T with W = [W_gate; W_up], so both share their first factor. A plain MLP has W_up alone.
    """
    check_method("matrix", [block])
    moments = Moments(None if rows.sink is None else block.normed(rows.sink)[0])  # norms are the same on both sides
    for teacher, student in rows.parts():
        z_student = block.normed(student)
        moments.add(z_student, block.normed(teacher) - z_student)
    fit = moments.solve(settings.ridge)
    with rows.as_student():
        weights = {site: weight_of(linear).double() for site, linear in block.mlps[0].reads_z.items()}
    both = torch.cat(list(weights.values()))  # W [2f, d] of a gated MLP
    # Directions of W E W^T from its d x d twin: with E = F F^T, eigenvectors V of F^T W^T W F give U = W F V / |.|
    values, vectors = torch.linalg.eigh(fit.energy)
    root = vectors * values.clamp(min=0).sqrt()
    twin = top_directions(root.T @ (both.T @ both) @ root, settings.rank)
    directions = torch.linalg.qr(both @ root @ twin)[0]  # U [2f, r]
    retained = share_kept(root.T @ (both.T @ both) @ root, twin)
    first = directions.T @ both @ fit.matrix  # [r, d]
    target = both @ fit.mean_out
    deltas: dict[str, TorchDelta] = {}
    start = 0
    for site, weight in weights.items():
        part = slice(start, start + weight.shape[0])
        deltas[site] = low_rank(fit, first, directions[part], target[part], rows.student.dtype, retained)
        start = part.stop
    return deltas | _output(block, rows, settings, below=deltas)


def fit_lora(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """`lora`: one pair and a bias beside `down`, so that a LoRA can carry it behind a post-norm too (lora_form)."""
    check_method("lora", [block])
    with rows.as_student():
        moments = Moments(None if rows.sink is None else block.hidden(rows.sink)[0], settings.bias)
    metric = torch.ones((), dtype=torch.float64)
    for teacher, student in rows.parts():
        o_teacher = block.mlp_half(teacher)
        with rows.as_student():
            o_student, hidden = block.mlp_half_and_hidden(student)
            target = o_teacher - o_student
            if block.post_norm is not None:
                target, metric = pre_norm_target(block, hidden, target)
        moments.add(hidden, target * metric)
    fit = moments.solve(settings.ridge)
    directions = top_directions(fit.energy, settings.rank)
    first, outputs, target = directions.T @ fit.matrix, directions / metric.view(-1, 1), fit.mean_out / metric
    delta = low_rank(fit, first, outputs, target, rows.student.dtype, share_kept(fit.energy, directions))
    return {"down": delta if settings.bias else replace(delta, bias=None)}


def _output(block: Block, rows: Rows, settings: Settings, below: Mapping[str, TorchDelta]) -> dict[str, TorchDelta]:
    """`mlp_out` for a student whose gate and up already carry `below`."""
    with rows.as_student(), applied(block, below):
        moments = Moments(None if rows.sink is None else block.hidden(rows.sink)[0])
    for teacher, student in rows.parts():
        o_teacher = block.mlp_half(teacher)
        with rows.as_student(), applied(block, below):
            o_student, hidden = block.mlp_half_and_hidden(student)
        moments.add(hidden, o_teacher - o_student)
    fit = moments.solve(settings.ridge)
    directions = top_directions(fit.energy, settings.rank)
    retained = share_kept(fit.energy, directions)
    return {"mlp_out": low_rank(fit, directions.T @ fit.matrix, directions, fit.mean_out, rows.student.dtype, retained)}


def low_rank(
    fit: AffineMap, first: Tensor, directions: Tensor, target: Tensor, dtype: torch.dtype, retained: float
) -> TorchDelta:
    """The pair a = first^T, b = directions^T, split evenly in scale, and the bias mean(target) - M_r mean(a)."""
    a, b = first.T, directions.T
    # Both factors of a direction get the same length: neither under- nor overflows when stored in half precision.
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).sqrt()
    a, b = a * scale, b / scale[:, None]
    bias = target - (fit.mean_in @ a) @ b
    return TorchDelta(bias.to(dtype), a.to(dtype), b.to(dtype), fit.mean_in.to(dtype), retained)


FORMS: Mapping[str, Form] = {"vector": fit_vector, "output": fit_output, "matrix": fit_matrix, "lora": fit_lora}

"""The forms of a static patch: closed-form regressions that fit one block of the student to the teacher.

Each form takes the completion rows of both sides at the block's split point and returns the deltas of this
block. The rows are v_T and v_S; in parallel blocks each row also holds the MLP's input. Row t of the teacher is aligned
with row t of the student. The letters are those of docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import Patch

from ..decoder import Block, TorchDelta, applied, weight_of
from .lora_form import pre_norm_target
from .ridge import AffineMap, Moments, share_kept, top_directions

_ROWS = 2048


@dataclass(frozen=True)
class Rows:
    """The data that a form is fitted on at one block.

    Attributes:
        teacher: the teacher's rows at the split point, v_T [N, d] (in parallel blocks v and u, [N, 2d]; see
            decoder/adapters.py).
        student: the same rows of the student, which is already patched below this block.
        sink: the student's row at position 0, the attention sink, whose direction is projected out of the maps. None if
            a KV prefix stands in its place, so that the student never runs that position.
        as_student: returns a context within which the block has the student's weights, if they are not the teacher's.
    """

    teacher: Tensor
    student: Tensor
    sink: Tensor | None
    as_student: Callable[[], AbstractContextManager[None]] = nullcontext

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (teacher, student) a few rows at a time: what a block computes from a row is several times as wide."""
        yield from zip(self.teacher.split(_ROWS), self.student.split(_ROWS), strict=True)


@dataclass(frozen=True)
class Settings:
    """The settings that the user chooses.

    Attributes:
        rank: the rank of each low-rank pair.
        ridge: the relative ridge.
        first_layer: the first block that is patched.
        bias: whether the `lora` form has a bias in addition to its pair.
    """

    rank: int = 16
    ridge: float = 1.0
    first_layer: int = 0
    bias: bool = True

    @classmethod
    def of(cls, patch: Patch) -> Settings:
        """Return the rank and the ridge of `patch`, with the defaults for what it does not state."""
        return cls(patch.rank or cls.rank, cls.ridge if patch.config.ridge is None else patch.config.ridge)


Form = Callable[[Block, Rows, Settings], dict[str, TorchDelta]]


def check_method(method: str, blocks: Sequence[Block]) -> None:
    """Check that a form applies to a model.

    Raises:
        CalibrationError: the method is `matrix` or `lora` and a block is a mixture of experts. A row passes through
            only a few of the experts, and each expert would need slots of its own.
    """
    for block in blocks:
        if method in ("matrix", "lora") and block.router is not None:
            raise CalibrationError(
                f"the {method} form does not support a mixture of experts",
                field="method",
                got=f"{len(block.mlps)} experts in layer {block.index}",
                wanted="one MLP per layer",
                fix="use --method output or vector",
            )


def fit_vector(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Fit `vector`, a thought vector: the mean of o_T - o_S over the rows, as a bias on the block's output."""
    sums = []
    for teacher, student in rows.parts():
        o_teacher = block.mlp_half(teacher)
        with rows.as_student():
            sums.append((o_teacher - block.mlp_half(student)).sum(0))
    return {"mlp_out": TorchDelta(bias=torch.stack(sums).sum(0) / len(rows.student))}


def fit_output(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Fit `output`: the ridge regression of o_T - o_S on h_S, as one low-rank pair and a bias after the MLP branch."""
    return _output(block, rows, settings, below={})


def fit_matrix(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Fit `matrix`: thought matrices W M on the linear layers that read z, then `output` on the remaining difference.

    M is the ridge regression of z_T - z_S on z_S, and all these layers use the same M. The pair is truncated in the
    metric of the joint output of gate and up, W M (G + l I) M^T W^T with W = [W_gate; W_up], so gate and up share their
    first factor. For a plain MLP, W is W_up only.
    """
    check_method("matrix", [block])
    moments = Moments(None if rows.sink is None else block.normed(rows.sink)[0])  # the norms of both sides are the same
    for teacher, student in rows.parts():
        z_student = block.normed(student)
        moments.add(z_student, block.normed(teacher) - z_student)
    fit = moments.solve(settings.ridge)
    with rows.as_student():
        weights = {site: weight_of(linear).double() for site, linear in block.mlps[0].reads_z.items()}
    stacked = torch.cat(list(weights.values()))  # W [2f, d] of a gated MLP
    # The directions of W E W^T come from a d x d problem: with E = F F^T, the eigenvectors V of F^T W^T W F give
    # U = W F V / |.|.
    values, vectors = torch.linalg.eigh(fit.energy)
    root = vectors * values.clamp(min=0).sqrt()
    small_directions = top_directions(root.T @ (stacked.T @ stacked) @ root, settings.rank)
    directions = torch.linalg.qr(stacked @ root @ small_directions)[0]  # U [2f, r]
    retained = share_kept(root.T @ (stacked.T @ stacked) @ root, small_directions)
    first = directions.T @ stacked @ fit.matrix  # [r, d]
    target = stacked @ fit.mean_out
    deltas: dict[str, TorchDelta] = {}
    start = 0
    for site, weight in weights.items():
        part = slice(start, start + weight.shape[0])
        deltas[site] = low_rank(fit, first, directions[part], target[part], rows.student.dtype, retained)
        start = part.stop
    return deltas | _output(block, rows, settings, below=deltas)


def fit_lora(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Fit `lora`: one pair and a bias on the output of `down`.

    A LoRA can represent this form in blocks with a post-norm too (lora_form.py).
    """
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
    """Fit `mlp_out` for a student whose gate and up already have the deltas `below`."""
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
    """Return the pair a = first^T, b = directions^T, evenly scaled, and the bias mean(target) - M_r mean(input)."""
    a, b = first.T, directions.T
    # Both factors of a direction get the same length, so that neither under- nor overflows in half precision.
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).sqrt()
    a, b = a * scale, b / scale[:, None]
    bias = target - (fit.mean_in @ a) @ b
    return TorchDelta(bias.to(dtype), a.to(dtype), b.to(dtype), fit.mean_in.to(dtype), retained)


FORMS: Mapping[str, Form] = {"vector": fit_vector, "output": fit_output, "matrix": fit_matrix, "lora": fit_lora}

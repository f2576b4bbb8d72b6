"""The forms of a static patch: closed-form regressions of one block's student onto its teacher.

Each form takes the completion rows of both sides at v (teacher v_T, student v_S, row t of one aligned with row t of
the other) and returns the deltas of this block. Letters as in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapters import Block
from .deltas import TorchDelta, applied
from .lora_form import pre_norm_target
from .ridge import AffineMap, fit_affine, top_directions


@dataclass(frozen=True)
class Rows:
    """What a form is fitted on at one block.

    Attributes:
        teacher: v_T [N, d].
        student: v_S [N, d], of the student as already patched below.
        sink: v_S [1, d] at position 0, the attention sink, whose direction is projected out of the maps.
    """

    teacher: Tensor
    student: Tensor
    sink: Tensor


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


def fit_vector(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Thought vector: the mean of o_T - o_S over the rows, a bias on the block's output."""
    difference = block.mlp_half(rows.teacher) - block.mlp_half(rows.student)
    return {"mlp_out": TorchDelta(bias=difference.mean(0))}


def fit_output(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """`output`: ridge of o_T - o_S on h_S, one low-rank pair and a bias after the MLP branch."""
    return _output(block, rows, settings, below={})


def fit_matrix(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """`matrix`: thought matrices W M on gate and up with one shared M, then `output` on what is left.

    M is the ridge of z_T - z_S on z_S. The pair is truncated in the metric of what gate and up output together,
    W M (G + l I) M^T W^T with W = [W_gate; W_up], so both share their first factor.
    """
    z_teacher, z_student = block.mlp_norm(rows.teacher), block.mlp_norm(rows.student)
    sink = block.mlp_norm(rows.sink)[0]
    fit = fit_affine(z_student, z_teacher - z_student, settings.ridge, sink)
    weights = {"gate": block.gate.weight.double(), "up": block.up.weight.double()}
    both = torch.cat(list(weights.values()))  # W [2f, d]
    # Directions of W E W^T from its d x d twin: with E = F F^T, eigenvectors V of F^T W^T W F give U = W F V / |.|
    values, vectors = torch.linalg.eigh(fit.energy)
    root = vectors * values.clamp(min=0).sqrt()
    twin = top_directions(root.T @ (both.T @ both) @ root, settings.rank)
    directions = torch.linalg.qr(both @ root @ twin)[0]  # U [2f, r]
    first = directions.T @ both @ fit.matrix  # [r, d]
    target = both @ fit.mean_out
    deltas: dict[str, TorchDelta] = {}
    start = 0
    for site, weight in weights.items():
        part = slice(start, start + weight.shape[0])
        deltas[site] = _delta(fit, first, directions[part], target[part], z_student.dtype)
        start = part.stop
    return deltas | _output(block, rows, settings, below=deltas)


def fit_lora(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """`lora`: one pair and a bias beside `down`, so that a LoRA can carry it behind a post-norm too (lora_form)."""
    target = block.mlp_half(rows.teacher) - block.mlp_half(rows.student)
    hidden = block.hidden(rows.student)
    sink = block.hidden(rows.sink)[0]
    metric = torch.ones(target.shape[-1], dtype=torch.float64, device=target.device)
    if block.post_norm is not None:
        target, metric = pre_norm_target(block, hidden, target)
    fit = fit_affine(hidden, target * metric, settings.ridge, sink, settings.bias)
    directions = top_directions(fit.energy, settings.rank)
    delta = _delta(fit, directions.T @ fit.matrix, directions / metric[:, None], fit.mean_out / metric, hidden.dtype)
    return {"down": delta if settings.bias else replace(delta, bias=None)}


def _output(block: Block, rows: Rows, settings: Settings, below: Mapping[str, TorchDelta]) -> dict[str, TorchDelta]:
    """`mlp_out` for a student whose gate and up already carry `below`."""
    o_teacher = block.mlp_half(rows.teacher)
    with applied(block, below):
        target = o_teacher - block.mlp_half(rows.student)
        hidden = block.hidden(rows.student)
        sink = block.hidden(rows.sink)[0]
    fit = fit_affine(hidden, target, settings.ridge, sink)
    directions = top_directions(fit.energy, settings.rank)
    return {"mlp_out": _delta(fit, directions.T @ fit.matrix, directions, fit.mean_out, hidden.dtype)}


def _delta(fit: AffineMap, first: Tensor, directions: Tensor, target: Tensor, dtype: torch.dtype) -> TorchDelta:
    """The pair a = first^T, b = directions^T, split evenly in scale, and the bias mean(target) - M_r mean(a)."""
    a, b = first.T, directions.T
    # Both factors of a direction get the same length: neither under- nor overflows when stored in half precision.
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).sqrt()
    a, b = a * scale, b / scale[:, None]
    bias = target - (fit.mean_in @ a) @ b
    return TorchDelta(bias=bias.to(dtype), a=a.to(dtype), b=b.to(dtype), mean=fit.mean_in.to(dtype))


FORMS: Mapping[str, Form] = {"vector": fit_vector, "output": fit_output, "matrix": fit_matrix, "lora": fit_lora}

"""Exact token-dependent patches: the theorem, used as the correctness anchor of the architecture adapters.

For one token, block by block, each block solved on the student as already patched below it (Dherin et al. 2025;
Goldwaser et al. 2025 for gated and post-norm blocks):

    dW_gate = W_gate (z_T - z_S) z_S^T / |z_S|^2        dW_up likewise, so the student's h becomes h_T
    no post-norm:   dW_down = (v_T - v_S) h_T^T / |h_T|^2
    post-norm of scale m:   tau = v_T + m y_T - v_S,   u = r (tau / m) / rms(tau / m),   r = rms(W_down h_T)
                            dW_down = (u - W_down h_T) h_T^T / |h_T|^2,   m' = tau / y(u)

with y the unscaled norm. The student then equals the teacher at that position. Every token is run afresh through the
unmodified transformers modules with its patch written into their weights, so a mistake in our own hooks cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import Block, blocks_of, layer_inputs

# A post-norm scale smaller than this is taken as this where tau is divided by it.
_SMALL_SCALE = 1e-6


@dataclass(frozen=True)
class Token:
    """One verified token: the teacher's greedy choice, the student's, and the largest logit difference."""

    teacher: int
    student: int
    max_logit_error: float


def verify(
    model: Any,
    teacher_prompt: Sequence[int],
    student_prompt: Sequence[int],
    new_tokens: int,
    *,
    blocks: Sequence[Block] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Token]:
    """Generate `new_tokens` greedily with the teacher, and each with a freshly patched student.

    Args:
        model: a transformers causal language model; its weights are changed for each token and put back.
        teacher_prompt: ids of [I ; q].
        student_prompt: ids of [q].
        new_tokens: tokens to verify; the completion does not stop at an end-of-sequence token.
        blocks: the blocks as an adapter sees them; by default those of the model's own adapter.
        progress: called after each token.
    """
    blocks = blocks_of(model) if blocks is None else blocks
    tokens: list[Token] = []
    completion: list[int] = []
    with torch.no_grad():
        for _ in range(new_tokens):
            wanted, at_v = _teacher(model, blocks, [*teacher_prompt, *completion])
            student = torch.tensor([[*student_prompt, *completion]], device=model.device)
            with _written(blocks):
                _patch_all(model, blocks, student, at_v)
                got = model(student, use_cache=False, logits_to_keep=1).logits[0, -1]
            tokens.append(Token(int(wanted.argmax()), int(got.argmax()), float((wanted - got).abs().max())))
            completion.append(tokens[-1].teacher)
            progress()
    return tokens


def _teacher(model: Any, blocks: Sequence[Block], ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The teacher's logits [vocab] and its v [d] at every block, at the last position, from one unmodified pass."""
    seen: list[Tensor] = []
    handles = [
        block.mlp_norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, -1])) for block in blocks
    ]
    try:
        logits = model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def _patch_all(model: Any, blocks: Sequence[Block], ids: Tensor, at_v: list[Tensor]) -> None:
    """Write this token's patch into every block, bottom up."""
    hidden, kwargs = layer_inputs(model, ids, torch.ones_like(ids))
    for block, v_teacher in zip(blocks, at_v, strict=True):
        v = block.attention_half(hidden, kwargs[block.index])
        _write(block, v_teacher, v[0, -1])
        hidden = block.mlp_half(v)


def _write(block: Block, v_teacher: Tensor, v_student: Tensor) -> None:
    """Solve one block in float64 and write the result into its weights."""
    z_teacher, z_student = block.mlp_norm(v_teacher).double(), block.mlp_norm(v_student).double()
    h = block.hidden(v_teacher).double()  # before gate and up change: what they will give the student
    down_h = block.down.weight.double() @ h
    for linear in (block.gate, block.up):
        _add_rank_one(linear.weight, linear.weight.double() @ (z_teacher - z_student), z_student)
    if block.post_norm is None:
        change = v_teacher.double() - v_student.double()
    else:
        change = _write_post_norm(block, v_teacher.double() - v_student.double(), down_h)
    _add_rank_one(block.down.weight, change, h)


def _add_rank_one(weight: Tensor, output: Tensor, inputs: Tensor) -> None:
    """weight += output inputs^T / |inputs|^2, so that the linear gives `output` more for `inputs`."""
    weight += torch.outer(output, inputs / inputs.square().sum()).to(weight.dtype)


def _write_post_norm(block: Block, v_difference: Tensor, down_h: Tensor) -> Tensor:
    """Set the post-norm's scale for the target tau, and return the change wanted of W_down h.

    transformers stores a Gemma scale as m - 1.
    """
    assert block.post_norm is not None
    weight: Tensor = block.post_norm.weight  # type: ignore[assignment]
    eps: float = block.post_norm.eps  # type: ignore[assignment]

    def unscaled(x: Tensor) -> Tensor:
        return x / (x.square().mean() + eps).sqrt()

    scale = 1 + weight.double()
    tau = v_difference + scale * unscaled(down_h)
    guarded = torch.where(scale.abs() < _SMALL_SCALE, torch.full_like(scale, _SMALL_SCALE), scale)
    direction = tau / guarded
    u = direction * (down_h.square().mean() / direction.square().mean()).sqrt()
    y = unscaled(u)
    weight.copy_((torch.where(y == 0, scale, tau / y) - 1).to(weight.dtype))
    return u - down_h


@contextmanager
def _written(blocks: Sequence[Block]) -> Iterator[None]:
    """Put every weight back on leaving."""
    modules = [
        module
        for block in blocks
        for module in (block.gate, block.up, block.down, block.post_norm)
        if module is not None
    ]
    kept = [module.weight.clone() for module in modules]  # type: ignore[operator]
    try:
        yield
    finally:
        for module, weight in zip(modules, kept, strict=True):
            module.weight.copy_(weight)  # type: ignore[operator]

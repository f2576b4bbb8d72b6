"""Exact token-dependent patches: the theorem, used to check that the architecture adapters are correct.

For one token, the blocks are solved one after another, each on the student as already patched below it (Dherin et al.
2025; Goldwaser et al. 2025 for gated, post-norm and expert blocks):

    dW = W (z_T - z_S) z_S^T / |z_S|^2      for every linear layer that reads z (gate and up, or the first layer of a
                                            plain MLP; the router), so that the student's h and its choice of experts
                                            become the teacher's
    tau = o_T - v_S                         the output that the student's branch needs, e.g. W_down h_T + (v_T - v_S)
    no post-norm:   u = tau
    post-norm:      s = sign(tau) sqrt|tau|,   u = r s / rms(s),   r = rms(W_down h_T),   m' = tau / y(u)
    dW_down = (u - W_down h_T) h_T^T / |h_T|^2, or, if `down` has a bias, db_down = u - W_down h_T
    experts: the same in every chosen expert, with the last line divided by the sum of their routing weights

Here m is the scale of the post-norm and y is the norm without it. The student then equals the teacher at that position.
Every token runs from scratch through the unmodified transformers modules, with its patch written into their weights.
A mistake in this project's own hooks therefore shows as an error.

Behind a post-norm, any u without zeros would solve the equations, but not at low precision: an error e_i of y_i becomes
e_i tau_i / y_i. If the length of y is given, the sum of the squares of these errors is smallest for y_i^2 proportional
to |tau_i|, which gives s. (With u along tau / m, which changes m by a factor only, the few coordinates with m near 0
dominate y, and the result is wrong in bfloat16.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoder import Block, Mlp, blocks_of, layer_inputs, plain_inputs, weight_of


@dataclass(frozen=True)
class Token:
    """The result of verifying one token.

    Attributes:
        teacher, student, unpatched: the greedy token of the teacher, and of the student with and without the patch.
        max_logit_error: the largest absolute difference between the logits of the teacher and the patched student.
        unpatched_logit_error: the same without the patch, which is the effect of the context. If it is small, the token
            proves nothing.
        residual_errors: max |o_S - o_T| / rms(o_T) for each layer at the last position, with o the layer's output.
    """

    teacher: int
    student: int
    unpatched: int
    max_logit_error: float
    unpatched_logit_error: float
    residual_errors: tuple[float, ...]


def verify(
    model: Any,
    teacher_prompt: Sequence[int],
    student_prompt: Sequence[int],
    new_tokens: int,
    *,
    blocks: Sequence[Block] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Token]:
    """Generate `new_tokens` tokens greedily with the teacher, and verify each with a freshly patched student.

    Args:
        model: a transformers causal language model in float32 or bfloat16. Its weights are changed for each token and
            restored afterwards.
        teacher_prompt: the token ids of [I ; q].
        student_prompt: the token ids of [q].
        new_tokens: the number of tokens to verify. The completion does not stop at an end-of-sequence token.
        blocks: the blocks as an adapter describes them; by default those of the model's own adapter.
        progress: a callback that runs after each token.

    Returns:
        One result for each token.
    """
    blocks = blocks_of(model) if blocks is None else blocks
    tokens: list[Token] = []
    completion: list[int] = []
    with torch.no_grad():
        for _ in range(new_tokens):
            tokens.append(_verify_token(model, blocks, [*teacher_prompt, *completion], [*student_prompt, *completion]))
            completion.append(tokens[-1].teacher)
            progress()
    return tokens


def _verify_token(model: Any, blocks: Sequence[Block], teacher_ids: list[int], student_ids: list[int]) -> Token:
    splits: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.at_split(lambda split: splits.append(split[0, -1])))
        wanted, teacher = _run(model, blocks, teacher_ids)
    bare, _ = _run(model, blocks, student_ids)
    with _Edits() as edits:
        _patch_all(model, blocks, student_ids, splits, teacher, edits)
        got, student = _run(model, blocks, student_ids)
    return Token(
        int(wanted.argmax()),
        int(got.argmax()),
        int(bare.argmax()),
        float((wanted - got).abs().max()),
        float((wanted - bare).abs().max()),
        tuple(float((s - t).abs().max() / t.square().mean().sqrt()) for s, t in zip(student, teacher, strict=True)),
    )


def _run(model: Any, blocks: Sequence[Block], ids: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits [vocab] and every block's output o [d] at the last position, in float32, from one pass."""
    outputs: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        outputs.append((out[0] if isinstance(out, tuple) else out)[0, -1].float())

    handles = [block.layer.register_forward_hook(keep) for block in blocks]
    try:
        out = model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[0, -1].float(), outputs


def _patch_all(
    model: Any,
    blocks: Sequence[Block],
    ids: Sequence[int],
    splits: Sequence[Tensor],
    outputs: Sequence[Tensor],
    edits: _Edits,
) -> None:
    """Write this token's patch into every block, bottom up, from the teacher's split tensors and outputs."""
    input_ids = torch.tensor([list(ids)], device=model.device)
    hidden, kwargs = layer_inputs(model, input_ids, plain_inputs(torch.ones_like(input_ids)))
    for block, teacher, wanted in zip(blocks, splits, outputs, strict=True):
        split = block.attention_half(hidden, kwargs[block.index])
        _write(block, teacher, wanted.double(), split[:, -1:], edits)
        hidden = block.mlp_half(split)


def _write(block: Block, teacher: Tensor, wanted: Tensor, student: Tensor, edits: _Edits) -> None:
    """Solve one block and write the result into its weights.

    Args:
        block: the block to patch.
        teacher: the teacher's split tensor [d or 2d].
        wanted: the teacher's output o [d], float64.
        student: the student's split tensor [1, 1, d or 2d].
        edits: the record of the changed weights.
    """
    z_teacher, z_student = block.normed(teacher).double(), block.normed(student).flatten().double()
    # This runs before any weight changes: the patched student will have the teacher's experts and h.
    chosen = _chosen(block, teacher)
    share = 1.0 if block.router is None else _routing_sum(block, teacher)
    branch = block.branch(teacher).flatten().double()
    tau = wanted - block.residual(student).double().flatten()
    u = tau if block.post_norm is None else _write_post_norm(block.post_norm, tau, branch, edits)
    readers = [linear for mlp, _ in chosen for linear in mlp.reads_z.values()]
    for linear in readers if block.router is None else [block.router, *readers]:
        weight = weight_of(linear)
        _add_rank_one(weight, weight.double() @ (z_teacher - z_student), z_student, edits)
    for mlp, h in chosen:
        bias: Tensor | None = mlp.down.bias  # type: ignore[assignment]
        if bias is not None:
            edits.set(bias, bias.double() + (u - branch) / share)
        else:
            _add_rank_one(weight_of(mlp.down), (u - branch) / share, h, edits)


def _chosen(block: Block, split: Tensor) -> list[tuple[Mlp, Tensor]]:
    """Return the MLP, or the experts that the block's own router chooses at `split`, each with its h [f] in float64."""
    chosen: list[tuple[Mlp, Tensor]] = []
    handles = [
        mlp.down.register_forward_pre_hook(lambda _m, args, mlp=mlp: chosen.append((mlp, args[0].flatten().double())))
        for mlp in block.mlps
    ]
    try:
        block.branch(split)
    finally:
        for handle in handles:
            handle.remove()
    return chosen


def _routing_sum(block: Block, split: Tensor) -> float:
    """Return the sum of the routing weights at `split`, i.e. what the branch outputs if every expert returns ones."""
    handles = [mlp.down.register_forward_hook(lambda _m, _args, out: torch.ones_like(out)) for mlp in block.mlps]
    try:
        return float(block.branch(split).flatten()[0])
    finally:
        for handle in handles:
            handle.remove()


def _add_rank_one(weight: Tensor, output: Tensor, inputs: Tensor, edits: _Edits) -> None:
    """Add output inputs^T / |inputs|^2 to weight [out, in]: the layer's output for `inputs` grows by `output`."""
    edits.set(weight, weight.double() + torch.outer(output, inputs / inputs.square().sum()))


def _write_post_norm(norm: Any, tau: Tensor, branch: Tensor, edits: _Edits) -> Tensor:
    """Set the post-norm's scale so that the norm maps u [d] to tau [d], and return u, which is as long as `branch` [d].

    transformers stores the scale of a Gemma norm as m - 1.
    """

    def unscaled(x: Tensor) -> Tensor:
        return x / (x.square().mean() + norm.eps).sqrt()

    direction = tau.sign() * tau.abs().sqrt()
    u = direction * (branch.square().mean() / direction.square().mean()).sqrt()
    y = unscaled(u)
    edits.set(norm.weight, torch.where(y == 0, torch.ones_like(y), tau / y) - 1)
    return u


class _Edits:
    """A context that records the weights changed within it and restores them on exit."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> _Edits:
        return self

    def __exit__(self, *_error: object) -> None:
        for weight, before in reversed(self._kept):
            weight.copy_(before)

    def set(self, weight: Tensor, value: Tensor) -> None:
        """Set `weight` to `value`, rounded to the weight's precision, and record the old value."""
        self._kept.append((weight, weight.clone()))
        weight.copy_(value)

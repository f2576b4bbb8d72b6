"""The form that every LoRA can represent: a pair on the output of `down`, before the post-norm if the block has one.

Without a post-norm, this form is the same as `output`. With a post-norm, o = v + m y(u), u = W_down h,
y(u) = u / rms(u). The block's output then has to change by e = o_T - o_S, but the pair can change only u. The exact
equation m y(u') = tau = o_T - v_S has no solution, because y has length sqrt(d) and tau has any length. The quotient
tau / m, which a token's own patch may use because it also changes m, becomes very large where m is small: Gemma's m
spans five orders of magnitude. The target is therefore the damped step [own]

    y' = y_S + m e / (m^2 + k mean(m^2)),    u' = r y' / rms(y'),    r = rms(u_S)

It minimises |m (y' - y_S) - e|^2 + k mean(m^2) |y' - y_S|^2 and is then put back on the sphere that the norm projects
to. u' - u_S is regressed on h_S in the metric sqrt(m^2 + k mean(m^2)) of that objective, so that the rank is spent on
the output of the norm. The blocks above are fitted on the result and correct what one block cannot reach. The mark
[own] has the same meaning as in docs/method.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..decoder import Block

# The damping k, found by trial on Gemma 3 270M. The values 0.1 and 0.01 differ little there.
_DAMPING = 0.1


def pre_norm_target(block: Block, hidden: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the wanted change to the output of `down`, and the metric to fit it in.

    Args:
        block: a block with a post-norm.
        hidden: the student's h_S [N, f].
        difference: the wanted change to the block's output, e = o_T - o_S [N, d].

    Returns:
        The change u' - u_S [N, d] and the metric [d], both float64.
    """
    assert block.post_norm is not None
    u = block.mlps[0].down(hidden).double()
    # An RMS norm applied to ones returns its scale.
    scale = block.post_norm(torch.ones_like(hidden[0, :1]).expand(u.shape[-1])).double()
    damped = scale.square() + _DAMPING * scale.square().mean()
    r = _rms(u)
    y = u / r + scale * difference.double() / damped
    return r * y / _rms(y) - u, damped.sqrt()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()

"""The form that every LoRA can carry: a pair beside `down`, in front of a post-norm where there is one.

Without a post-norm it is `output` under another name. With one, o = v + m y(u), u = W_down h, y(u) = u / rms(u), the
block is to output e = o_T - o_S more, and the pair can only move u. Exactly, m y(u') = tau = o_T - v_S has no solution
(y has length sqrt(d), tau any); and tau / m, which a token's own patch may use since it changes m too, blows up where
m is small: Gemma's m spans five orders of magnitude. So the target is the damped step [own]

    y' = y_S + m e / (m^2 + k mean(m^2)),    u' = r y' / rms(y'),    r = rms(u_S)

which minimises |m (y' - y_S) - e|^2 + k mean(m^2) |y' - y_S|^2 and is put back on the sphere that the norm projects to.
u' - u_S is regressed on h_S, in the metric sqrt(m^2 + k mean(m^2)) of that objective, so that rank is spent on what
leaves the norm. What one block cannot reach is left to the blocks above, which are fitted on what came of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..decoder import Block

# The damping k: found by trial on Gemma 3 270M, where 0.1 and 0.01 differ little.
_DAMPING = 0.1


def pre_norm_target(block: Block, hidden: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """What `down` should give more, and the metric to fit it in.

    Args:
        block: a block with a post-norm.
        hidden: h_S [N, f].
        difference: e = o_T - o_S [N, d].

    Returns:
        u' - u_S [N, d] and the metric [d], both float64.
    """
    assert block.post_norm is not None
    u = block.mlps[0].down(hidden).double()
    # An RMS norm of ones is its scale.
    scale = block.post_norm(torch.ones_like(hidden[0, :1]).expand(u.shape[-1])).double()
    damped = scale.square() + _DAMPING * scale.square().mean()
    r = _rms(u)
    y = u / r + scale * difference.double() / damped
    return r * y / _rms(y) - u, damped.sqrt()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()

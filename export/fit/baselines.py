"""Two heuristic baselines that the closed form has to beat, fitted to the same slots.

    isotropic   the lock-step fit of `output`, but with a multiple of the identity in place of the Gram matrix, G = c I,
                c = mean(diag G): M = sum_t d_t a_t^T / (c + l), a sum of rank-one updates as in ROME-like edits
    steering    s = mean_t (o_T - o_S) at every block, from ONE pass of the unpatched student, added to the residual
                stream: the contrastive mean-difference vector. No block is fitted after another, and there is no
                regression

The rows of steering are the completion positions, which every other form is fitted on too. Users of steering choose
the layer and the strength by trial; `steering_candidates` lists the combinations to try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Block, TorchDelta, blocks_of, layer_inputs, plain_inputs
from ..rollout import Batch, Dialogue, batches
from .forms import Rows, Settings, low_rank
from .ridge import AffineMap, share_kept, top_directions

# Strengths to try for the vector of one block, and for the vectors of all blocks together. The latter are smaller
# because the vector of each block already contains the differences of the blocks below.
_ONE_LAYER_STRENGTHS = (0.5, 1.0, 2.0)
_ALL_LAYERS_STRENGTHS = (0.03, 0.1, 0.3, 1.0)


def fit_isotropic(block: Block, rows: Rows, settings: Settings) -> dict[str, TorchDelta]:
    """Fit `output` with an isotropic Gram matrix: one low-rank pair and a bias after the MLP branch."""
    o_teacher = block.mlp_half(rows.teacher)
    with rows.as_student():
        o_student, hidden = block.mlp_half_and_hidden(rows.student)
        sink = None if rows.sink is None else block.hidden(rows.sink)[0]
    target = o_teacher - o_student
    fit = isotropic_map(hidden, target, settings.ridge, sink)
    directions = top_directions(fit.energy, settings.rank)
    first, retained = directions.T @ fit.matrix, share_kept(fit.energy, directions)
    return {"mlp_out": low_rank(fit, first, directions, fit.mean_out, hidden.dtype, retained)}


def isotropic_map(inputs: Tensor, targets: Tensor, ridge: float, sink: Tensor | None) -> AffineMap:
    """Compute M = sum_t d_t a_t^T / (c + l) with c = mean(diag G) and l = ridge * c.

    The rows are centred, and the direction of the attention sink is projected out of the inputs.

    Args:
        inputs: the inputs a [N, n], one row per completion position.
        targets: the targets d [N, m].
        ridge: the penalty, relative to c.
        sink: the activation s of the attention sink at this site [n], for which M s = 0; None if there is no sink.
    """
    a, d = inputs.double(), targets.double()
    mean_in, mean_out = a.mean(0), d.mean(0)
    a, d = a - mean_in, d - mean_out
    if sink is not None:
        s = sink.double() / sink.double().norm()
        a = a - torch.outer(a @ s, s)
    scale = ((1 + ridge) * a.square().sum() / a.shape[1]).clamp(min=torch.finfo(a.dtype).tiny)
    matrix = d.T @ a / scale
    return AffineMap(matrix, scale * matrix @ matrix.T, mean_in, mean_out)


def fit_steering(
    model: nn.Module,
    dialogues: Sequence[Dialogue],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, TorchDelta]]:
    """Compute the mean difference between the residual streams of teacher and student after every block.

    The teacher and the student each run once, and both are unpatched.

    Args:
        model: a transformers causal language model that has an adapter, in eval mode.
        dialogues: the calibration sequences.
        batch_size: the number of dialogues per forward pass.
        progress: a callback that receives (blocks done, blocks in all) after each block.

    Returns:
        A mapping layer -> {"mlp_out": a bias [d]}, for strength 1.
    """
    blocks = blocks_of(model)
    device = next(model.parameters()).device
    with torch.no_grad():
        pairs = batches(dialogues, batch_size, device)
        # For every batch, the hidden states of teacher and student at the current block only. The two are compared only
        # in the means.
        states = [[_embed(model, batch) for batch in pair] for pair in pairs]
        deltas = {}
        for block in blocks:
            sums: Any = 0.0
            for pair, sides in zip(pairs, states, strict=True):
                for i, (hidden, kwargs) in enumerate(sides):
                    sides[i] = (block.mlp_half(block.attention_half(hidden, kwargs[block.index])), kwargs)
                sums = sums + (pair[0].rows(sides[0][0]) - pair[1].rows(sides[1][0])).double().sum(0)
            count = sum(len(teacher.row) for teacher, _ in pairs)
            deltas[block.index] = {"mlp_out": TorchDelta((sums / count).to(states[0][0][0].dtype))}
            progress(block.index + 1, len(blocks))
    return deltas


def steering_candidates(layers: int) -> Iterator[tuple[list[int], float]]:
    """Yield the (layers, strength) combinations to try.

    These are up to eight single layers, spread over the depth of the model, and all layers together.
    """
    step = max(1, layers // 8)
    for layer in range(step - 1, layers, step):
        for strength in _ONE_LAYER_STRENGTHS:
            yield [layer], strength
    for strength in _ALL_LAYERS_STRENGTHS:
        yield list(range(layers)), strength


def _embed(model: nn.Module, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
    return layer_inputs(model, batch.input_ids, plain_inputs(batch.attention_mask))

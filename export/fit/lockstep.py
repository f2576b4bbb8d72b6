"""The lock-step fit: teacher and student advance together, one block at a time.

At each block, the attention of both sides runs first and gives v_T and v_S. The form is then fitted on the completion
rows. After that the student's MLP half runs with the fit applied at EVERY position, including the first, as it will in
the runtime. The blocks above therefore see the errors of the blocks below and correct them. If all blocks were fitted
in parallel from one unpatched student, every block would correct the same error.

Cost: one pass of the teacher and one of the student over the tokens, plus the MLP halves of the completion rows and the
solves. Only one block's weights and the two sets of hidden states are in use at a time, so a model bigger than memory
can be fitted from disk (source/offload.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Block, TorchDelta, TorchPrefix, applied, blocks_of, layer_inputs, plain_inputs
from ..quantise import QuantisedStudent, as_student
from ..rollout import Batch, Dialogue, batches
from ..source import resident
from .baselines import fit_isotropic
from .forms import FORMS, Rows, Settings


@dataclass
class _Side:
    """The teacher or the student on one batch.

    Attributes:
        batch: the sequences of this side.
        hidden: the current hidden states.
        layer_kwargs: the keyword arguments that transformers passes to each layer.
    """

    batch: Batch
    hidden: Tensor
    layer_kwargs: list[dict[str, Any]]

    @classmethod
    def start(cls, model: nn.Module, batch: Batch, prefix: TorchPrefix | None = None) -> _Side:
        mask = batch.attention_mask
        inputs = plain_inputs(mask) if prefix is None else prefix.model_inputs(mask)
        hidden, kwargs = layer_inputs(model, batch.input_ids, inputs)
        return cls(batch, hidden, kwargs)

    def attend(self, block: Block) -> None:
        self.hidden = block.attention_half(self.hidden, self.layer_kwargs[block.index])

    def feed_forward(self, block: Block) -> None:
        self.hidden = block.mlp_half(self.hidden)

    def rows(self) -> Tensor:
        return self.batch.rows(self.hidden)


def fit_lockstep(
    model: nn.Module,
    dialogues: Sequence[Dialogue],
    method: str,
    settings: Settings,
    *,
    prefix: TorchPrefix | None = None,
    student: QuantisedStudent | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, TorchDelta]]:
    """Fit a static patch.

    Args:
        model: a transformers causal language model that has an adapter, in eval mode.
        dialogues: the calibration sequences. Every student prompt starts with the same token.
        method: the name of one of the `FORMS`, or `isotropic`.
        settings: the settings of the form: rank, ridge, first layer and bias.
        prefix: the key/value entries that will precede the student's tokens, if there are any.
        student: the weights that the student will have, if they are not the teacher's.
        batch_size: the number of dialogues per forward pass.
        progress: a callback that receives (blocks done, blocks in all) after each block.

    Returns:
        A mapping layer -> site -> delta, on the model's device and in its dtype.
    """
    form = {**FORMS, "isotropic": fit_isotropic}[method]
    blocks = blocks_of(model)
    device = next(model.parameters()).device
    with torch.no_grad():
        replaced = 0 if prefix is None else len(prefix.replaces)
        pairs = list(batches(dialogues, batch_size, device, replaced))
        teachers = [_Side.start(model, batch) for batch, _student in pairs]
        with as_student(student):  # the token embeddings are quantised too
            students = [_Side.start(model, batch, prefix) for _teacher, batch in pairs]
        deltas: dict[int, dict[str, TorchDelta]] = {}
        for block in blocks:
            weights = partial(student.layer, block) if student is not None else nullcontext
            with resident(block.layer):
                for teacher in teachers:
                    teacher.attend(block)
                with weights():
                    for side in students:
                        side.attend(block)
                rows = Rows(
                    torch.cat([side.rows() for side in teachers]),
                    torch.cat([side.rows() for side in students]),
                    None if prefix is not None else students[0].hidden[:1, 0],
                    weights,
                )
                deltas[block.index] = {} if block.index < settings.first_layer else form(block, rows, settings)
                for teacher in teachers:
                    teacher.feed_forward(block)
                with weights(), applied(block, deltas[block.index]):
                    for side in students:
                        side.feed_forward(block)
            progress(block.index + 1, len(blocks))
    return deltas

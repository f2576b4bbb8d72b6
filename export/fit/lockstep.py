"""The lock-step fit: teacher and student advance together, one block at a time.

At each block, the attention of the teacher runs first. If the patch has entries, those of this block are then fitted to
the student's own queries (entries.py). The student attends behind them, which gives v_T and v_S, and the form is fitted
on the completion rows. After that the student's MLP half runs with the fit applied at EVERY position, including the
first, as it will in the runtime. The blocks above therefore see the errors of the blocks below and correct them. If all
blocks were fitted in parallel from one unpatched student, every block would correct the same error.

Cost: one pass of the teacher and one of the student over the tokens, plus the MLP halves of the completion rows and the
solves. With entries the student's attention half runs twice, before and after they are fitted. The context in front is
run once and not per query: the teacher stands behind its cached keys and values. Only one block's weights and the two
sets of hidden states are in use at a time, so a model bigger than memory can be fitted from disk (source/offload.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compaction import round_entry
from ..decoder import (
    Block,
    Entry,
    TorchDelta,
    TorchPrefix,
    applied,
    attending,
    blocks_of,
    kv_shape,
    layer_inputs,
    plain_inputs,
)
from ..quantise import QuantisedStudent, as_student
from ..rollout import Batch, Dialogue, batches
from ..source import resident
from .baselines import fit_isotropic
from .entries import Compaction, RowChoice, StudentRows, TeacherRows, fit_entries, most_rows
from .forms import FORMS, Rows, Settings


@dataclass(frozen=True)
class Behind:
    """Where the sequences of a fit stand.

    Attributes:
        teacher: the context's cached keys and values, which replace the beginning of the teacher's prompts; None if the
            teacher runs its whole prompts.
        student: all entries of the context, with the ids that they replace in the student's prompts; None for a patch
            without entries.
        compaction: how the student's entries are fitted; None if the student keeps them all.
    """

    teacher: TorchPrefix | None = None
    student: TorchPrefix | None = None
    compaction: Compaction | None = None


class _Side:
    """The teacher or the student on one batch.

    Args:
        model: the model.
        batch: the sequences of this side.
        prefix: what the sequences stand behind; None for whole sequences.

    Attributes:
        batch: the sequences of this side.
        hidden: the current hidden states.
    """

    def __init__(self, model: nn.Module, batch: Batch, prefix: TorchPrefix | None) -> None:
        self._model, self.batch, self._behind = model, batch, prefix is not None
        inputs = plain_inputs(batch.attention_mask) if prefix is None else prefix.model_inputs(batch.input_ids)
        with self._attending(None):
            self.hidden, self._kwargs = layer_inputs(model, batch.input_ids, inputs)

    def _attending(self, entries: Sequence[Entry | None] | None, **observers: Any) -> AbstractContextManager[None]:
        return attending(self._model, entries, **observers) if self._behind else nullcontext()

    def split(self, block: Block, entries: Sequence[Entry | None] | None = None, **observers: Any) -> Tensor:
        """Run the block's attention half behind `entries` and return the tensor at its split point."""
        with self._attending(entries, **observers):
            return block.attention_half(self.hidden, self._kwargs[block.index])

    def attend(self, block: Block, entries: Sequence[Entry | None] | None = None, **observers: Any) -> None:
        """Run the block's attention half and go on from its split point."""
        self.hidden = self.split(block, entries, **observers)

    def feed_forward(self, block: Block) -> None:
        """Run the block's MLP half."""
        self.hidden = block.mlp_half(self.hidden)

    def rows(self) -> Tensor:
        """Return the completion rows [N, d or 2d] of the hidden states."""
        return self.batch.rows(self.hidden)


def fit_lockstep(
    model: nn.Module,
    dialogues: Sequence[Dialogue],
    method: str | None,
    settings: Settings,
    *,
    behind: Behind = Behind(),
    student: QuantisedStudent | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[int, dict[str, TorchDelta]], TorchPrefix | None]:
    """Fit a static patch.

    Args:
        model: a transformers causal language model that has an adapter, in eval mode.
        dialogues: the calibration sequences. Every student prompt starts with the same token.
        method: the name of one of the `FORMS`, or `isotropic`; None for a patch without deltas.
        settings: the settings of the form: rank, ridge, first layer and bias.
        behind: what teacher and student stand behind, and how the student's entries are fitted. If the student has
            entries, the teacher stands behind the context too, so that both run the same tokens.
        student: the weights that the student will have, if they are not the teacher's.
        batch_size: the number of dialogues per forward pass.
        progress: a callback that receives (blocks done, blocks in all) after each block.

    Returns:
        A mapping layer -> site -> delta, on the model's device and in its dtype; and the student's entries.
    """
    form = None if method is None else {**FORMS, "isotropic": fit_isotropic}[method]
    blocks = blocks_of(model)
    device = next(model.parameters()).device
    cut = _length(behind.teacher), _length(behind.student)
    made: list[Entry | None] = list(behind.student.entries) if behind.student else [None] * len(blocks)
    with torch.no_grad():
        pairs = list(batches(dialogues, batch_size, device, *cut))
        teachers = [_Side(model, batch, behind.teacher) for batch, _student in pairs]
        with as_student(student):  # the token embeddings are quantised too
            students = [_Side(model, batch, behind.student) for _teacher, batch in pairs]
        chosen = _chosen(model, behind, [side.batch for side in students])
        cached = None if behind.teacher is None else behind.teacher.entries
        deltas: dict[int, dict[str, TorchDelta]] = {}
        for block in blocks:
            weights = partial(student.layer, block) if student is not None else nullcontext
            with resident(block.layer):
                heads = None if chosen is None else TeacherRows(chosen)
                for teacher in teachers:
                    teacher.attend(block, cached, after=None if heads is None else heads.keep)
                with weights():
                    if chosen is not None and heads is not None:
                        made[block.index] = _entries(block, behind, chosen, heads, teachers, students)
                    for side in students:
                        side.attend(block, made)
                deltas[block.index] = {}
                if form is not None and block.index >= settings.first_layer:
                    rows = Rows(
                        torch.cat([side.rows() for side in teachers]),
                        torch.cat([side.rows() for side in students]),
                        None if behind.student is not None else students[0].hidden[:1, 0],
                        weights,
                    )
                    deltas[block.index] = form(block, rows, settings)
                for teacher in teachers:
                    teacher.feed_forward(block)
                with weights(), applied(block, deltas[block.index]):
                    for side in students:
                        side.feed_forward(block)
            progress(block.index + 1, len(blocks))
    if behind.student is None:
        return deltas, None
    entries = [entry for entry in made if entry is not None]
    return deltas, replace(behind.student, entries=entries)


def _length(prefix: TorchPrefix | None) -> int:
    return 0 if prefix is None else len(prefix.replaces)


def _chosen(model: nn.Module, behind: Behind, students: Sequence[Batch]) -> RowChoice | None:
    if behind.student is None or behind.compaction is None:
        return None
    config: Any = model.config
    most = most_rows(config, behind.student.position, kv_shape(config)[0])
    return RowChoice(students, most, behind.compaction.answer_weight)


def _entries(
    block: Block,
    behind: Behind,
    chosen: RowChoice,
    heads: TeacherRows,
    teachers: Sequence[_Side],
    students: Sequence[_Side],
) -> Entry:
    """Fit the entries of one block; the teachers have attended, the students have not."""
    assert behind.student is not None and behind.compaction is not None
    context, count = behind.student.entries[block.index], behind.compaction.counts[block.index]
    if behind.compaction.exact and count >= context[0].shape[1]:
        return round_entry(context, behind.compaction.stored)
    collected = StudentRows(chosen)
    for side in students:
        collected.run(partial(side.split, block, before=collected.keep))
    inputs, splits = (
        torch.cat([chosen.of(number, side.hidden) for number, side in enumerate(sides)])
        for sides in (students, teachers)
    )
    return fit_entries(
        block,
        collected.rows(),
        torch.cat(heads.heads),
        splits,
        inputs,
        chosen.weight,
        context,
        count,
        behind.compaction,
    )

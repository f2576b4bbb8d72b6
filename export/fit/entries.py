"""The entries of a patch, fitted layer by layer in lock-step: from batches of hidden states to the rows of a layer.

The teacher is the base model behind all entries of the context, the student the same model behind the entries that are
being fitted. Both run the same tokens, so their rows are the same tokens too. Which tokens count is fixed once for all
layers: all of them, or a random part where there are more than memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compaction import QueryRows, Ridges, Rounding, Target, compact, text_part, unrounded
from ..decoder import Block, Entry, Heads
from ..rollout import Batch

ANSWER_WEIGHT = 5.0
LEAST_FORWARD = 96  # entries; below, the selection one after another lost on the policy (docs/fidelity.md)
MOST_ROWS = 8192
_MOST_SHARES = 2**26  # of one key/value head: rows * query heads of its group * entries of the context; 256 MiB


@dataclass(frozen=True)
class Compaction:
    """What the fit needs to know of the entries.

    Attributes:
        counts: the number of entries of each layer.
        ridges: the ridges of the fit.
        answer_weight: the weight of a row that predicts a token of an answer; other rows have 1.
        forward: whether entries are selected one after another; otherwise each one by itself.
        exact: whether a layer that keeps all entries keeps them as they are, in the precision of the file. They are
            exact for the teacher's weights; a student of other weights gets values that are fitted to it, and so does
            a file of four bits.
        stored: the rounding of the file, so that the layers above see what it stores.
    """

    counts: tuple[int, ...]
    ridges: Ridges = field(default_factory=Ridges)
    answer_weight: float = ANSWER_WEIGHT
    forward: bool = False
    exact: bool = True
    stored: Rounding = unrounded


class _Done(Exception):
    """Ends a layer's run once its heads are known."""


class RowChoice:
    """The tokens of all batches whose rows the entries are fitted to.

    Args:
        batches: the batches of the student's sequences, without the ids that the entries replace.
        most: the largest number of tokens; above it, a random part is taken.
        answer_weight: the weight of the rows that predict an answer.
        seed: the seed of the choice.
    """

    def __init__(self, batches: Sequence[Batch], most: int, answer_weight: float, seed: int = 0) -> None:
        lengths = [int(batch.attention_mask.sum()) for batch in batches]
        generator = torch.Generator().manual_seed(seed)
        kept = torch.zeros(sum(lengths), dtype=torch.bool)
        kept[torch.randperm(len(kept), generator=generator)[:most]] = True
        self._where: list[tuple[Tensor, Tensor]] = []
        weights = []
        for batch, part in zip(batches, kept.split(lengths), strict=True):
            row, position = batch.attention_mask.cpu().nonzero(as_tuple=True)
            answers = torch.zeros_like(batch.attention_mask.cpu(), dtype=torch.bool)
            answers[batch.row.cpu(), batch.position.cpu()] = True
            self._where.append((row[part], position[part]))
            weights.append(torch.where(answers[row[part], position[part]], answer_weight, 1.0))
        self.weight = torch.cat(weights)
        self.place = torch.cat([position for _row, position in self._where])

    def of(self, number: int, hidden: Tensor) -> Tensor:
        """Return the chosen tokens of batch `number` from its tensor [b, T, ...]."""
        row, position = self._where[number]
        return hidden[row.to(hidden.device), position.to(hidden.device)]


def most_rows(config: Any, context: int, kv_heads: int) -> int:
    """Return the largest number of tokens for a context of that many entries."""
    group = config.num_attention_heads // kv_heads
    return max(256, min(MOST_ROWS, _MOST_SHARES // (group * context)))


class TeacherRows:
    """Collects the outputs of the teacher's heads at the chosen tokens of one layer, batch by batch."""

    def __init__(self, choice: RowChoice) -> None:
        self._choice = choice
        self.heads: list[Tensor] = []

    def keep(self, _layer: int, out: Tensor) -> None:
        """Take the outputs of one batch, [b, T, heads, head dim]."""
        self.heads.append(self._choice.of(len(self.heads), out))


class StudentRows:
    """Collects the student's queries and what they see of the text at the chosen tokens, and ends the layer's run."""

    def __init__(self, choice: RowChoice) -> None:
        self._choice = choice
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last: Heads | None = None

    def keep(self, _layer: int, heads: Heads) -> None:
        """Take the heads of one batch.

        Raises:
            _Done: always; `run` catches it.
        """
        lse, out = text_part(heads)
        number = len(self._parts)
        self._parts.append(
            (
                self._choice.of(number, heads.query.transpose(1, 2)),
                self._choice.of(number, lse),
                self._choice.of(number, out),
            )
        )
        self._last = heads
        raise _Done

    def run(self, attend: Callable[[], object]) -> None:
        """Run a layer's attention half until its heads are known."""
        try:
            attend()
        except _Done:
            return

    def rows(self) -> QueryRows:
        """Return the rows of all batches."""
        assert self._last is not None
        query, lse, out = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        place = self._choice.place.to(query.device)
        return QueryRows(query, lse, out, place, int(self._last.key.shape[1]), self._last)


def fit_entries(
    block: Block,
    rows: QueryRows,
    teacher_heads: Tensor,
    teacher_split: Tensor,
    student_input: Tensor,
    weight: Tensor,
    context: Entry,
    count: int,
    compaction: Compaction,
) -> Entry:
    """Fit the entries of one layer.

    Args:
        block: the block, with the student's weights.
        rows: the student's rows, [N, ...].
        teacher_heads: the outputs of the teacher's heads, [N, heads, head dim].
        teacher_split: the teacher's rows at the split point, [N, d or 2d].
        student_input: the student's rows at the block's input x_S, [N, d].
        weight: the weight of each row, [N].
        context: all entries of the context.
        count: the number of entries to fit.
        compaction: the settings.

    Returns:
        The entries, rounded to what the file stores.
    """
    output = block.attention_output()
    projection, bias, length = output.weight, output.bias, None
    if output.gain is not None:
        branch = teacher_heads.flatten(1) @ output.weight.T
        branch = branch if bias is None else branch + bias
        length = (branch.square().mean(-1) + output.eps).sqrt()
        projection = projection * output.gain[:, None]
        bias = None if bias is None else bias * output.gain
    change = block.residual(teacher_split) - student_input
    if bias is not None:
        change = change - (bias if length is None else bias / length[:, None])
    target = Target(teacher_heads, change, projection, length, weight.to(teacher_heads))
    return compact(rows, context, count, target, compaction.ridges, compaction.stored, forward=compaction.forward)

"""Teacher and student sequences: the same completion after two prompts.

    teacher  [I ; q ; y]        student  [q ; y]

The rows that a patch is fitted and measured on are the positions that predict the completion tokens y, the first one
(the prompt's last position) and the end-of-sequence token included. They are aligned from the end of the prompt on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dialogue:
    """One query's token ids: the prompt with the context, the prompt without it, and the teacher's completion."""

    teacher_prompt: tuple[int, ...]
    student_prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def teacher(self) -> tuple[int, ...]:
        """[I ; q ; y] without its last token, which predicts nothing that is measured."""
        return (*self.teacher_prompt, *self.completion[:-1])

    def student(self) -> tuple[int, ...]:
        """[q ; y] without its last token."""
        return (*self.student_prompt, *self.completion[:-1])


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences (causal attention never sees the padding) and their completion rows.

    Attributes:
        input_ids: [b, T].
        attention_mask: [b, T], 1 on tokens.
        row: [N] sequence index of each completion row, `position`: [N] its position.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device | str) -> Batch:
        """Pad `sequences`; completion rows run from `starts[i]` to the end of sequence i."""
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        row: list[int] = []
        position: list[int] = []
        for i, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            row += [i] * (len(tokens) - start)
            position += range(start, len(tokens))
        return cls(
            ids.to(device), mask.to(device), torch.tensor(row, device=device), torch.tensor(position, device=device)
        )

    def rows(self, hidden: Tensor) -> Tensor:
        """The completion rows [N, d] of hidden states [b, T, d]."""
        # A device map may have taken the hidden states to another device than the ids.
        return hidden[self.row.to(hidden.device), self.position.to(hidden.device)]


def batches(
    dialogues: Sequence[Dialogue], size: int, device: torch.device | str, replaced: int = 0
) -> list[tuple[Batch, Batch]]:
    """(teacher, student) batches of at most `size` dialogues of similar length, with aligned rows.

    The students go without their first `replaced` ids, for which a KV prefix stands.
    """
    ordered = sorted(dialogues, key=lambda d: len(d.teacher()))
    pairs = []
    for i in range(0, len(ordered), size):
        part = ordered[i : i + size]
        teacher = Batch.of([d.teacher() for d in part], [len(d.teacher_prompt) - 1 for d in part], device)
        starts = [len(d.student_prompt) - 1 - replaced for d in part]
        student = Batch.of([d.student()[replaced:] for d in part], starts, device)
        pairs.append((teacher, student))
    return pairs

"""Teacher and student sequences: the same completion after two prompts.

    teacher  [I ; q ; y]        student  [q ; y]

The rows that a patch is fitted and measured on are the positions that predict the completion tokens y. They include the
position that predicts the first token, which is the prompt's last, and the one that predicts the end-of-sequence token.
The rows of teacher and student are aligned from the end of the prompt on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_LOGITS = 2**21  # the attention logits of a batch and head: dialogues * longest^2


@dataclass(frozen=True)
class Dialogue:
    """The token ids of one query.

    Attributes:
        teacher_prompt: the prompt with the context.
        student_prompt: the prompt without the context.
        completion: the teacher's completion.
    """

    teacher_prompt: tuple[int, ...]
    student_prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def teacher(self) -> tuple[int, ...]:
        """Return [I ; q ; y] without the last token, since no measured token comes after it."""
        return (*self.teacher_prompt, *self.completion[:-1])

    def student(self) -> tuple[int, ...]:
        """Return [q ; y] without the last token."""
        return (*self.student_prompt, *self.completion[:-1])


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and their completion rows; causal attention never sees the padding.

    Attributes:
        input_ids: the token ids, [b, T].
        attention_mask: 1 on tokens and 0 on padding, [b, T].
        row: the index of the sequence that each completion row belongs to, [N].
        position: the position of each completion row in its sequence, [N].
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device | str) -> Batch:
        """Pad `sequences`; the completion rows of sequence i run from `starts[i]` to its end."""
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
        """Return the completion rows [N, d] of hidden states [b, T, d]."""
        # With a device map the hidden states may be on another device than the ids.
        return hidden[self.row.to(hidden.device), self.position.to(hidden.device)]


def batches(
    dialogues: Sequence[Dialogue], size: int, device: torch.device | str, cached: int = 0, replaced: int = 0
) -> list[tuple[Batch, Batch]]:
    """Return (teacher, student) batches of dialogues of similar length, with aligned rows.

    Args:
        dialogues: the dialogues.
        size: the largest number of dialogues in a batch; batches of long dialogues are smaller.
        device: the device of the batches' tensors.
        cached: the number of ids that the context's cached keys and values replace; the teachers' sequences go without
            these first ids.
        replaced: the number of ids that a KV prefix replaces; the students' sequences go without these first ids.
    """

    def length(dialogue: Dialogue) -> int:
        return max(len(dialogue.teacher()) - cached, len(dialogue.student()) - replaced)

    pairs, part = [], list[Dialogue]()
    for dialogue in sorted(dialogues, key=length):
        if part and (len(part) == size or (len(part) + 1) * length(dialogue) ** 2 > _MOST_LOGITS):
            pairs.append(_pair(part, device, cached, replaced))
            part = []
        part.append(dialogue)
    return [*pairs, _pair(part, device, cached, replaced)] if part else pairs


def _pair(part: Sequence[Dialogue], device: torch.device | str, cached: int, replaced: int) -> tuple[Batch, Batch]:
    starts = [len(d.teacher_prompt) - 1 - cached for d in part]
    teacher = Batch.of([d.teacher()[cached:] for d in part], starts, device)
    starts = [len(d.student_prompt) - 1 - replaced for d in part]
    return teacher, Batch.of([d.student()[replaced:] for d in part], starts, device)

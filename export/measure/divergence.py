"""KL(reference || arm) token by token, many arms against one reference, one dialogue's logits in memory at a time.

A dialogue has two prompts and one completion (sequences.py), so an arm also says which of its prompts it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..rollout import Dialogue
from .fidelity import Student

# dialogue -> logits [completion tokens, vocab], row i the prediction of completion token i.
Arm = Callable[[Dialogue], Tensor]


def with_prompt(student: Student) -> Arm:
    """The arm that sees the prompt: [I ; q ; y]."""
    return lambda dialogue: student(dialogue.teacher(), len(dialogue.teacher_prompt) - 1)


def without_prompt(student: Student) -> Arm:
    """The arm that does not: [q ; y]."""
    return lambda dialogue: student(dialogue.student(), len(dialogue.student_prompt) - 1)


@dataclass(frozen=True)
class Divergence:
    """One arm against the reference.

    Attributes:
        kl: per dialogue, KL(reference || arm) in nats at each completion token, [completion tokens].
        agree: per dialogue, whether the two argmax agree, [completion tokens].
    """

    kl: tuple[NDArray[np.float64], ...]
    agree: tuple[NDArray[np.bool_], ...]

    @property
    def mean(self) -> float:
        """Nats per token over all tokens of all dialogues."""
        return float(np.concatenate(self.kl).mean())

    @property
    def top1(self) -> float:
        """Share of tokens at which the argmax is the reference's."""
        return float(np.concatenate(self.agree).mean())

    def by_dialogue(self) -> list[float]:
        """Nats per token of each dialogue; NaN where there is no token."""
        return [float(kl.mean()) if len(kl) else float("nan") for kl in self.kl]

    def by_position(self, width: int = 1) -> tuple[list[float], list[int]]:
        """Nats per token in bins of `width` completion positions, and the tokens in each bin.

        The means weighted by the counts add up to `mean`.
        """
        longest = max(map(len, self.kl))
        bins = range(0, longest, width)
        values = [np.concatenate([kl[start : start + width] for kl in self.kl]) for start in bins]
        return [float(value.mean()) for value in values], [len(value) for value in values]


def diverge(
    dialogues: Sequence[Dialogue],
    reference: Arm,
    arms: Mapping[str, Arm],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Divergence]:
    """Measure every arm on the completion tokens of `dialogues`, at least one token in all.

    Args:
        dialogues: the sequences; those with an empty completion count for nothing.
        reference: whose distribution is the wanted one.
        arms: name -> arm.
        progress: called after each dialogue.
    """
    kl: dict[str, list[NDArray[np.float64]]] = {name: [] for name in arms}
    agree: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in arms}
    for dialogue in dialogues:
        wanted = reference(dialogue).float().log_softmax(-1) if dialogue.completion else None
        for name, arm in arms.items():
            if wanted is None:
                kl[name].append(np.zeros(0))
                agree[name].append(np.zeros(0, bool))
                continue
            got = arm(dialogue).float().log_softmax(-1).to(wanted.device)
            kl[name].append((wanted.exp() * (wanted - got)).sum(-1).double().cpu().numpy())
            agree[name].append((wanted.argmax(-1) == got.argmax(-1)).cpu().numpy())
        progress()
    return {name: Divergence(tuple(kl[name]), tuple(agree[name])) for name in arms}

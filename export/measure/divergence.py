"""KL(reference || arm) at every token, for many arms against one reference.

An arm is one of the models under comparison. Only the logits of one dialogue are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..rollout import Dialogue
from .students import Student


class Arm(Protocol):
    """One side of a comparison: a student, and the choice of which of a dialogue's two prompts it sees."""

    def __call__(self, dialogue: Dialogue) -> Tensor:
        """Return the logits [completion tokens, vocab]; row i predicts completion token i."""

    def attached(self) -> AbstractContextManager[None]:
        """Return a context within which the arm is ready to run; see Student."""


@dataclass(frozen=True)
class _StudentArm:
    student: Student
    prompted: bool

    def __call__(self, dialogue: Dialogue) -> Tensor:
        if self.prompted:
            return self.student(dialogue.teacher(), len(dialogue.teacher_prompt) - 1)
        return self.student(dialogue.student(), len(dialogue.student_prompt) - 1)

    def attached(self) -> AbstractContextManager[None]:
        return self.student.attached()


def with_prompt(student: Student) -> Arm:
    """Return the arm in which `student` sees the prompt: [I ; q ; y]."""
    return _StudentArm(student, prompted=True)


def without_prompt(student: Student) -> Arm:
    """Return the arm in which `student` does not see the prompt: [q ; y]."""
    return _StudentArm(student, prompted=False)


@dataclass(frozen=True)
class Divergence:
    """The divergence of one arm from the reference.

    Attributes:
        kl: for each dialogue, KL(reference || arm) in nats at each completion token, [completion tokens].
        agree: for each dialogue, whether the argmax of the arm equals that of the reference, [completion tokens].
    """

    kl: tuple[NDArray[np.float64], ...]
    agree: tuple[NDArray[np.bool_], ...]

    @property
    def tokens(self) -> int:
        """The number of completion tokens in all dialogues."""
        return sum(map(len, self.kl))

    @property
    def mean(self) -> float:
        """The mean KL in nats per token, over all tokens of all dialogues."""
        return float(np.concatenate(self.kl).mean())

    @property
    def top1(self) -> float:
        """The share of tokens at which the argmax equals that of the reference."""
        return float(np.concatenate(self.agree).mean())

    @property
    def first(self) -> Divergence:
        """The divergence at the first completion token of each dialogue alone."""
        return Divergence(tuple(kl[:1] for kl in self.kl), tuple(agree[:1] for agree in self.agree))

    def by_dialogue(self) -> list[float]:
        """Return the mean KL of each dialogue in nats per token; NaN for a dialogue without tokens."""
        return [float(kl.mean()) if len(kl) else float("nan") for kl in self.kl]

    def by_position(self, width: int = 1) -> tuple[list[float], list[int]]:
        """Return the mean KL in bins of `width` completion positions, and the number of tokens in each bin.

        The bins' means are in nats per token. Their average, weighted by the token counts, is `mean`.
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
    """Measure every arm on the completion tokens of `dialogues`.

    Args:
        dialogues: the sequences; a dialogue with an empty completion contributes no token.
        reference: the arm whose distribution the others are compared with.
        arms: the arms by name.
        progress: a function that is called after each dialogue.

    Returns:
        The divergence of each arm from the reference, by the arm's name.
    """
    kl: dict[str, list[NDArray[np.float64]]] = {name: [] for name in arms}
    agree: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in arms}
    with ExitStack() as stack:
        for arm in (reference, *arms.values()):
            stack.enter_context(arm.attached())
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

"""The few figures on how close a student comes to its teacher.

They are stored in a patch file, and `tp-export evaluate` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tp_runtime.errors import CalibrationError

from ..rollout import Dialogue
from .divergence import diverge, gap_closed, require_effect, with_prompt, without_prompt
from .students import Student


@dataclass(frozen=True)
class Fidelity:
    """Figures over the completion tokens of all queries.

    Attributes:
        kl_unpatched: the KL of the unpatched student from the teacher, in nats per token.
        kl_patched: the KL of the patched student from the teacher, in nats per token.
        gap_closed: 1 - kl_patched / kl_unpatched.
        top1_agreement: the share of tokens at which the patched student and the teacher have the same argmax.
        top1_agreement_unpatched: the same share for the unpatched student.
        completion_tokens: the number of completion tokens.
        queries: the number of queries.
    """

    kl_unpatched: float
    kl_patched: float
    gap_closed: float
    top1_agreement: float
    top1_agreement_unpatched: float
    completion_tokens: int
    queries: int

    def to_dict(self) -> dict[str, float]:
        """Return the figures for JSON and for the patch file, rounded to six decimals."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


def measure_fidelity(
    dialogues: Sequence[Dialogue],
    teacher: Student,
    unpatched: Student,
    patched: Student,
    progress: Callable[[], object] = lambda: None,
) -> Fidelity:
    """Compare the unpatched and the patched student with the teacher over the completion tokens of `dialogues`.

    Raises:
        CalibrationError: there are no completion tokens, or the context has no effect, so there is no gap to close.
    """
    tokens = sum(len(dialogue.completion) for dialogue in dialogues)
    if not tokens:
        raise CalibrationError(
            "the teacher gave no completion tokens for the held-out queries",
            field="queries",
            got=f"{len(dialogues)} queries",
            wanted="at least one with a completion",
            fix="use other queries, or check whether the model answers at all",
        )
    arms = {"unpatched": without_prompt(unpatched), "patched": without_prompt(patched)}
    found = diverge(dialogues, with_prompt(teacher), arms, progress)
    base, ours = found["unpatched"], found["patched"]
    require_effect(base.mean)
    return Fidelity(
        kl_unpatched=base.mean,
        kl_patched=ours.mean,
        gap_closed=gap_closed(base.mean, ours.mean),
        top1_agreement=ours.top1,
        top1_agreement_unpatched=base.top1,
        completion_tokens=tokens,
        queries=len(dialogues),
    )

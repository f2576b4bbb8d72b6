"""The few figures on how close a student comes to its teacher.

They are stored in a patch file, and `tp-export evaluate` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from tp_runtime.errors import CalibrationError

from ..rollout import Dialogue
from .closeness import measure_closeness, require_effect
from .divergence import diverge, with_prompt, without_prompt
from .students import Student

_SMALLEST_ERROR = 5e-5  # smaller ones are those of figures that are exact but for rounding


@dataclass(frozen=True)
class Fidelity:
    """Figures over the completion tokens of all queries.

    The standard errors are by bootstrap over the queries; they are None for fewer than two queries.

    Attributes:
        kl_unpatched: the KL of the unpatched student from the teacher, in nats per token.
        kl_patched: the KL of the patched student from the teacher, in nats per token.
        gap_closed: 1 - kl_patched / kl_unpatched.
        gap_closed_se: the standard error of `gap_closed`.
        kl_unpatched_first: the KL of the unpatched student at the first completion token, in nats.
        gap_closed_first: the gap closed at the first completion token; None where the prompt has no effect on it.
        gap_closed_first_se: the standard error of `gap_closed_first`.
        top1_agreement: the share of tokens at which the patched student and the teacher have the same argmax.
        top1_agreement_first: the same share at the first completion token.
        top1_agreement_unpatched: the share of tokens for the unpatched student.
        completion_tokens: the number of completion tokens.
        queries: the number of queries.
    """

    kl_unpatched: float
    kl_patched: float
    gap_closed: float
    gap_closed_se: float | None
    kl_unpatched_first: float
    gap_closed_first: float | None
    gap_closed_first_se: float | None
    top1_agreement: float
    top1_agreement_first: float
    top1_agreement_unpatched: float
    completion_tokens: int
    queries: int

    def to_dict(self) -> dict[str, float]:
        """Return the figures for JSON and for the patch file, rounded to six decimals, without those that are None."""
        return {key: round(value, 6) for key, value in asdict(self).items() if value is not None}


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
    require_effect(found["unpatched"])
    base, ours = (measure_closeness(found["unpatched"], found[arm]) for arm in arms)
    assert ours.gap_closed is not None  # the prompt has an effect
    return Fidelity(
        kl_unpatched=base.kl,
        kl_patched=ours.kl,
        gap_closed=ours.gap_closed,
        gap_closed_se=ours.gap_closed_se,
        kl_unpatched_first=base.kl_first,
        gap_closed_first=ours.gap_closed_first,
        gap_closed_first_se=ours.gap_closed_first_se,
        top1_agreement=ours.top1_agreement,
        top1_agreement_first=ours.top1_agreement_first,
        top1_agreement_unpatched=base.top1_agreement,
        completion_tokens=tokens,
        queries=len(dialogues),
    )


def fidelity_line(figures: Mapping[str, float], of: str) -> str:
    """Return the figures of `Fidelity.to_dict` as one line for people.

    Args:
        figures: the figures, perhaps with those of `Accuracy.to_dict`.
        of: what the patch stands in for, such as "the prompt".
    """
    shares = [f"{_share(figures, 'gap_closed')} of {of}"]
    if "gap_closed_first" in figures:
        shares.append(f"first token {_share(figures, 'gap_closed_first')}")
    else:
        shares.append("no first-token gap")  # the prompt has no effect on the first token
    shares.append(f"same top token {figures['top1_agreement']:.1%}")
    kept = next((name for name in ("accuracy_exact_kept", "accuracy_kept") if name in figures), None)
    if kept is not None:
        shares.append(f"{_share(figures, kept)} of the right answers kept")
    return (
        f"held out: {', '.join(shares)} "
        f"(KL {figures['kl_unpatched']:.3f} -> {figures['kl_patched']:.3f} nats per token, "
        f"{figures['completion_tokens']} tokens of {figures['queries']} queries)"
    )


def _share(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.1%}{error_text(figures.get(f'{name}_se'))}"


def error_text(error: float | None, space: str = " ") -> str:
    """Return the standard error of a share in percent, such as " ± 0.7"; empty if it is unknown, or says nothing."""
    return "" if error is None or error < _SMALLEST_ERROR else f"{space}±{space}{100 * error:.2g}"

"""How close one model comes to the prompted one, measured against the model without a prompt.

A share of a gap says nothing where there is no gap. Where the prompt changes the KL by no more than the rounding of
float32, there is no share, and the figure is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from tp_runtime.errors import CalibrationError

from .bootstrap import ratio_error
from .divergence import Divergence

_NO_EFFECT = 1e-7  # nats per token: the rounding of float32 makes two equal models differ by about this much


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """The figures of one model on the completion tokens of some queries.

    The names that end in `_first` are for the first completion token of each answer alone. On this token a task often
    makes its choice, while the mean over all tokens hides it behind tokens that only continue the form.

    Attributes:
        kl: the KL from the prompted model, in nats per token.
        kl_first: the same at the first token.
        gap_closed: 1 - kl / KL without a prompt; None where the prompt has no effect.
        gap_closed_se: the bootstrap standard error of `gap_closed` over the queries; None for fewer than two queries
            on which the prompt has an effect.
        gap_closed_first: the gap closed at the first token; None where the prompt has no effect on it.
        gap_closed_first_se: the standard error of `gap_closed_first`.
        top1_agreement: the share of tokens at which this model and the prompted one have the same argmax.
        top1_agreement_first: the same share at the first token.
    """

    kl: float
    kl_first: float
    gap_closed: float | None
    gap_closed_se: float | None
    gap_closed_first: float | None
    gap_closed_first_se: float | None
    top1_agreement: float
    top1_agreement_first: float


def measure_closeness(unpatched: Divergence, model: Divergence) -> Closeness:
    """Compare a model with the prompted one, over the tokens on which the unpatched model was measured too.

    Args:
        unpatched: the divergence of the model without a prompt and without a patch; it has at least one token.
        model: the divergence of the model in question, on the same dialogues.
    """
    gap, error = gap_closed(unpatched, model)
    first_gap, first_error = gap_closed(unpatched.first, model.first)
    return Closeness(
        kl=model.mean,
        kl_first=model.first.mean,
        gap_closed=gap,
        gap_closed_se=error,
        gap_closed_first=first_gap,
        gap_closed_first_se=first_error,
        top1_agreement=model.top1,
        top1_agreement_first=model.first.top1,
    )


def gap_closed(unpatched: Divergence, model: Divergence) -> tuple[float | None, float | None]:
    """Return 1 - KL(model) / KL(unpatched) and its bootstrap standard error over the queries.

    Both KLs are means over all tokens, so a query counts by its tokens. Both results are None where the prompt has no
    effect.
    """
    if not has_effect(unpatched):
        return None, None
    error = ratio_error([kl.sum() for kl in model.kl], [kl.sum() for kl in unpatched.kl])
    return 1 - model.mean / unpatched.mean, error


def has_effect(unpatched: Divergence) -> bool:
    """Return whether the prompt changes the model by more than the rounding of float32."""
    return unpatched.mean >= _NO_EFFECT


def require_effect(unpatched: Divergence) -> None:
    """Check that the prompt changes the answers, so that there is a gap to close.

    Raises:
        CalibrationError: the KL of the unpatched model is no larger than the rounding of float32.
    """
    if not has_effect(unpatched):
        raise CalibrationError(
            "the prompt has no effect on these queries",
            field="prompt",
            got=f"KL {unpatched.mean:.2g} without a patch",
            wanted="a difference to close",
            fix="use the prompt that the patch was made from, or other queries",
        )

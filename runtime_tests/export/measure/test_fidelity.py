"""Fidelity: the gap over all tokens and at the first one, standard errors, and figures that do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from tp_export.measure import Divergence, Student, fidelity_line, measure_closeness, measure_fidelity, ratio_error
from tp_export.rollout import Dialogue
from tp_runtime.errors import CalibrationError
from tp_runtime.patch import PatchConfig


def divergence(*kl: Sequence[float]) -> Divergence:
    return Divergence(tuple(np.array(values) for values in kl), tuple(np.array(values, float) < 0.5 for values in kl))


UNPATCHED = divergence([4.0, 0.2, 0.2], [2.0], [1.0, 0.6], [])
PATCHED = divergence([1.0, 0.1, 0.1], [0.4], [0.1, 0.6], [])


class Fake:
    """A student that gives the same logits at every position, but others at the first completion token."""

    def __init__(self, first: Sequence[float], later: Sequence[float]) -> None:
        self._first, self._later = torch.tensor(first), torch.tensor(later)

    def attached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, tokens: Sequence[int], first: int) -> Tensor:
        return torch.stack([self._first, *[self._later] * (len(tokens) - first - 1)])


TEACHER = Fake([2.0, 0.0, 0.0], [0.0, 2.0, 0.0])
UNPROMPTED = Fake([0.0, 2.0, 0.0], [0.0, 0.0, 2.0])
DIALOGUES = [Dialogue((1, 2), (2,), (5, 6, 7)[:length]) for length in (3, 1, 2)]


def test_the_gap_at_the_first_token_is_measured_on_first_tokens_alone() -> None:
    found = measure_closeness(UNPATCHED, PATCHED)
    assert found.kl == pytest.approx(2.3 / 6) and found.kl_first == pytest.approx(1.5 / 3)
    assert found.gap_closed == pytest.approx(1 - 2.3 / 8) and found.gap_closed_first == pytest.approx(1 - 1.5 / 7)
    assert found.top1_agreement == pytest.approx(4 / 6) and found.top1_agreement_first == pytest.approx(2 / 3)


def test_queries_are_drawn_whole_for_the_standard_errors() -> None:
    found = measure_closeness(UNPATCHED, PATCHED)
    assert found.gap_closed_se == pytest.approx(ratio_error([1.2, 0.4, 0.7, 0], [4.4, 2, 1.6, 0]))
    assert found.gap_closed_first_se == pytest.approx(ratio_error([1, 0.4, 0.1, 0], [4, 2, 1, 0]))


def test_a_first_token_without_an_effect_of_the_prompt_has_no_gap() -> None:
    found = measure_closeness(divergence([1e-9, 2.0], [-1e-9, 1.0]), divergence([5e-9, 1.0], [1e-9, 0.5]))
    assert found.gap_closed == pytest.approx(0.5)
    assert found.gap_closed_first is None and found.gap_closed_first_se is None


def test_fidelity_has_the_figures_of_the_patched_student() -> None:
    same_first = Fake([2.0, 0.0, 0.0], [0.0, 0.0, 2.0])
    found = measure_fidelity(DIALOGUES, TEACHER, UNPROMPTED, same_first)
    assert found.gap_closed_first == pytest.approx(1) and found.gap_closed == pytest.approx(0.5)
    assert found.top1_agreement_first == 1 and found.top1_agreement == 0.5 and found.top1_agreement_unpatched == 0
    assert found.gap_closed_first_se == pytest.approx(0, abs=1e-6) and found.gap_closed_se is not None
    assert found.kl_unpatched_first == pytest.approx(found.kl_unpatched)


def test_figures_that_do_not_exist_are_not_stored() -> None:
    teacher = Fake([2.0, 0.0, 0.0], [0.0, 2.0, 0.0])
    unpatched = Fake([2.0, 0.0, 0.0], [0.0, 0.0, 2.0])  # the prompt changes only later tokens
    figures = measure_fidelity(DIALOGUES[:1], teacher, unpatched, unpatched).to_dict()
    assert not {"gap_closed_first", "gap_closed_first_se", "gap_closed_se"} & set(figures)
    assert figures["kl_unpatched_first"] == 0
    config = PatchConfig("p", "output", "base", 64 * "0", "llama", "fp32", "", fidelity=figures)
    assert config.fidelity == figures
    assert "no first-token gap" in fidelity_line(figures, "the prompt")


def test_a_prompt_without_an_effect_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the prompt has no effect on these queries"):
        measure_fidelity(DIALOGUES, TEACHER, TEACHER, UNPROMPTED)


def test_the_line_for_people_states_the_errors() -> None:
    closer: Student = Fake([1.5, 0.4, 0.0], [0.0, 1.0, 1.0])
    found = measure_fidelity(DIALOGUES, TEACHER, UNPROMPTED, closer).to_dict()
    line = fidelity_line({**found, "gap_closed_se": 0.0123}, "the prompt")
    assert f"held out: {found['gap_closed']:.1%} ± 1.2 of the prompt" in line and "kept" not in line
    # The first token is the same in all answers, so its error is zero, which says nothing.
    assert f"first token {found['gap_closed_first']:.1%}, same top token {found['top1_agreement']:.1%}" in line
    assert "6 tokens of 3 queries" in line
    kept = fidelity_line({**found, "accuracy_exact_kept": 0.9, "accuracy_exact_kept_se": 0.041}, "the prompt")
    assert ", 90.0% ± 4.1 of the right answers kept (KL" in kept

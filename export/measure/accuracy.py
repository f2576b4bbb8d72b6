"""Accuracy on questions with expected answers.

This module measures the share of questions that the prompted, the patched and the unpatched model answer correctly. It
also measures how many of the prompted model's correct answers the patched model keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tp_runtime.errors import CalibrationError
from tp_runtime.text import TextCodec

from ..rollout import Prompting
from .answers import Answers, Prompts, within_stop
from .bootstrap import ratio_error

Right = NDArray[np.bool_]
"""For each question, whether its answer is correct, [questions]."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions that are answered correctly in the free-running, greedy completion.

    Attributes:
        exact: whether an answer had to equal the expected one up to the stop string; otherwise it had to contain it.
        prompted: the share that the model with the context answers correctly.
        patched: the share that the model with the patch answers correctly.
        unpatched: the share that the model with neither answers correctly.
        kept: among the questions that the prompted model answers correctly, the share that the patched model answers
            correctly too; None if the prompted model answers none correctly.
        kept_se: the bootstrap standard error of `kept` over the questions; None for fewer than two such questions.
        questions: the number of questions.
    """

    exact: bool
    prompted: float
    patched: float
    unpatched: float
    kept: float | None
    kept_se: float | None
    questions: int

    def to_dict(self) -> dict[str, float]:
        """Return the figures for JSON, rounded to four decimals, without those that are None.

        The names begin with `accuracy_exact_` if answers had to be exact, and with `accuracy_` otherwise.
        """
        start = "accuracy_exact_" if self.exact else "accuracy_"
        values = {key: getattr(self, key) for key in ("prompted", "patched", "unpatched", "kept", "kept_se")}
        figures = {start + key: round(value, 4) for key, value in values.items() if value is not None}
        return {**figures, f"{start}questions": self.questions}


def measure_accuracy(
    prompting: Prompting,
    answers: Mapping[str, str],
    prompted: Answers,
    unpatched: Answers,
    patched: Answers,
    stop: Sequence[str] = (),
) -> Accuracy:
    """Ask three models every question and compare their answers with the expected ones.

    Args:
        prompting: how questions are asked with the context and without it.
        answers: the expected answer to each query.
        prompted: the completions of the prompted model; its prompts contain the context.
        unpatched: the completions of the model with neither context nor patch.
        patched: the completions of the model with the patch.
        stop: the stop strings, see `right_answers`.

    Raises:
        CalibrationError: `answers` is empty.
    """
    if not answers:
        raise CalibrationError("no question has an expected answer", field="queries", got=0, wanted="at least one")
    plain = [prompting.student(query) for query in answers]
    with_context = [prompting.teacher(query) for query in answers]
    expected = list(answers.values())

    def right(name: str, model: Answers, prompts: Prompts) -> Right:
        return right_answers(prompting.codec, model, prompts, expected, stop, f"answers, {name}")

    before, neither = right("prompted", prompted, with_context), right("unpatched", unpatched, plain)
    after = right("patched", patched, plain)
    kept, error = share_kept(before, after)
    return Accuracy(
        bool(stop), float(before.mean()), float(after.mean()), float(neither.mean()), kept, error, len(answers)
    )


def right_answers(
    codec: TextCodec, model: Answers, prompts: Prompts, expected: Sequence[str], stop: Sequence[str], label: str
) -> Right:
    """Return which of the questions a model answers correctly.

    With stop strings, an answer is correct if its text before the first of them equals the expected one; white space
    around both does not matter. What a model goes on to invent then neither helps nor harms. Without stop strings
    nothing says where an answer ends, so it is correct if it contains the expected text as whole words; upper and lower
    case do not matter.

    Args:
        codec: decodes the answers.
        model: the completions of the model.
        prompts: the token ids of each question.
        expected: the expected answer to each question.
        stop: the stop strings.
        label: the label of the progress bar.
    """
    texts = [codec.decode(completion) for completion in model(prompts, label)]
    return np.array([_is_right(text, wanted, stop) for text, wanted in zip(texts, expected, strict=True)], bool)


def _is_right(text: str, wanted: str, stop: Sequence[str]) -> bool:
    if stop:
        return within_stop(text, stop).strip() == within_stop(wanted, stop).strip()
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE) is not None


def share_kept(prompted: Right, patched: Right) -> tuple[float | None, float | None]:
    """Return the share of the prompted model's correct answers that the patched model keeps, and its standard error.

    Both are None if the prompted model answers no question correctly, since there is nothing to keep.
    """
    if not prompted.any():
        return None, None
    return float(patched[prompted].mean()), ratio_error(prompted & patched, prompted)

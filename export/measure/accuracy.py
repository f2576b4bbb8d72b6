"""Accuracy on questions with expected answers.

This module measures the share of questions that the prompted, the patched and the unpatched model answer correctly. It
also measures how many of the prompted model's correct answers the patched model keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tp_runtime.errors import CalibrationError

from ..source import Source
from .answers import Answers


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions whose expected answer occurs in the free-running, greedy completion.

    Attributes:
        prompted: the share that the model with the context answers correctly.
        patched: the share that the model with the patch answers correctly.
        unpatched: the share that the model with neither answers correctly.
        kept: among the questions that the prompted model answers correctly, the share that the patched model answers
            correctly too; 1 if the prompted model answers none correctly.
        questions: the number of questions.
    """

    prompted: float
    patched: float
    unpatched: float
    kept: float
    questions: int

    def to_dict(self) -> dict[str, float]:
        """Return the shares for JSON, rounded to four decimals, under names that begin with `accuracy_`."""
        values = asdict(self)
        return {f"accuracy_{key}": round(values[key], 4) for key in ("prompted", "patched", "unpatched", "kept")}


def measure_accuracy(
    source: Source, context: str, answers: Mapping[str, str], prompted: Answers, unpatched: Answers, patched: Answers
) -> Accuracy:
    """Ask three models every question and compare their answers with the expected ones.

    An answer is correct if it contains the expected text as whole words; upper and lower case do not matter.

    Args:
        source: the base model, whose codec renders the questions.
        context: the system prompt of the prompted model.
        answers: the expected answer to each query.
        prompted: the completions of the prompted model; its prompts contain the context.
        unpatched: the completions of the model with neither context nor patch.
        patched: the completions of the model with the patch.

    Raises:
        CalibrationError: `answers` is empty.
    """
    if not answers:
        raise CalibrationError("no question has an expected answer", field="queries", got=0, wanted="at least one")
    plain = [source.codec.render(query) for query in answers]
    with_context = [source.codec.render(query, context) for query in answers]
    right = {}
    for name, answer, prompts in (
        ("prompted", prompted, with_context),
        ("unpatched", unpatched, plain),
        ("patched", patched, plain),
    ):
        texts = [source.codec.decode(completion) for completion in answer(prompts, f"answers, {name}")]
        right[name] = [
            re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE) is not None
            for wanted, text in zip(answers.values(), texts, strict=True)
        ]
    kept = [after for before, after in zip(right["prompted"], right["patched"], strict=True) if before]
    shares = {name: sum(correct) / len(correct) for name, correct in right.items()}
    return Accuracy(**shares, kept=sum(kept) / len(kept) if kept else 1.0, questions=len(answers))

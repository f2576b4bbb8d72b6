"""Make the student of a quantised precision, and choose the quantiser of `int4` that loses least on the model."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from tp_runtime.patch import FLOAT_PRECISIONS

from ..quantise import (
    INT4,
    MEASURED,
    Precision,
    QuantisedStudent,
    check_precision,
    held_out_text,
    log_probabilities,
    quantised,
    token_kl,
)
from ..queries import load_questions
from ..rollout import Prompting, dialogues_for
from ..source import Source

QUESTIONS, LONGEST = 128, 96  # about 12,000 tokens of calibration text


def student_for(source: Source, model: Any, precision: str) -> QuantisedStudent | None:
    """Return the student in a precision, or None for a float precision, whose student is the model itself.

    Args:
        source: the base model.
        model: the same model, loaded in float32.
        precision: one of PRECISIONS. `int4` and `int4-fp16` make the student of each of their quantisers, and
            the one that loses least on held-out text is returned.

    Raises:
        ModelFormatError: the precision is unknown.
    """
    check_precision(precision)
    if precision in FLOAT_PRECISIONS:
        return None

    @cache  # the model answers once, and only if a quantiser needs its answers
    def texts() -> list[list[int]]:
        return calibration_texts(source, model)

    def made(candidate: Precision) -> QuantisedStudent:
        return QuantisedStudent.of(model, candidate, texts() if candidate.calibrated is not None else ())

    if precision not in MEASURED:
        return made(quantised(precision))
    window = model.config.get_text_config().max_position_embeddings
    ids = source.codec.render(held_out_text(), raw=True)[:window]
    text = torch.tensor([ids], device=next(model.parameters()).device)
    reference = log_probabilities(model, text)
    best: QuantisedStudent | None = None
    least = 0.0
    for name in (each + precision.removeprefix("int4") for each in INT4):
        student = made(quantised(name))
        with student.whole():
            got = log_probabilities(model, text)
        loss = float(token_kl(reference, got).mean())
        tqdm.write(f"{name}: KL to float32 {loss:.4f} nats per token", file=sys.stderr)
        if best is None or loss < least:
            best, least = student, loss
    return best


def calibration_texts(source: Source, model: Any) -> list[list[int]]:
    """Return the ids of built-in questions with the model's own answers."""
    questions = load_questions(None)[:QUESTIONS]
    found = dialogues_for(model, Prompting(source.codec, None), questions, LONGEST)
    return [[*dialogue.student()] for dialogue in found]

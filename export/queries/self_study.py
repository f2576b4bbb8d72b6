"""Self-study: the base model writes its own questions about a document, to fit a patch on.

A patch knows a fact as far as the calibration queries ask about it. So every line of the document is put to the model,
which has the whole document in context, and it is asked for questions that the line answers: in several wordings, and
sampled, since one greedy question a line would fit one phrasing alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tp_runtime.errors import CalibrationError

from ..rollout import check_length, complete
from ..source import Source
from .questions import query_key

# Instructions in front of a line; each gives another kind of question.
_WORDINGS = (
    "Write one short question that this line answers: {line}",
    "A customer wants to know this: {line} Write the question the customer asks.",
    "Turn this statement into a question, in other words: {line}",
    "Write a simple question in everyday words. The answer to the question is: {line}",
)
_LONGEST_QUESTION = 40  # tokens
_TEMPERATURE = 0.8


def write_questions(
    source: Source,
    model: Any,
    document: str,
    rounds: int,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Questions about `document`, without repetitions, in an order that goes round its lines.

    Args:
        source: the base model, chat style.
        model: the same, loaded.
        document: facts, rules or prose; a line (or a sentence of a long line) is one thing to ask about.
        rounds: how often to go through the document; every round words the task in another way or samples anew.
        seed: another seed, other questions.
        progress: called with the number of answers just sampled.

    Raises:
        CalibrationError: the document is empty, the model is completion style, or none of its answers is a question.
        RequestError: the document does not fit the context window.
    """
    if source.codec.style != "chat":
        raise CalibrationError(
            "a completion-style model cannot be asked to write questions",
            field="SRC",
            got=source.name,
            wanted="a chat model",
            fix="write the queries yourself and pass --queries",
        )
    lines = statements(document)
    if not lines:
        raise CalibrationError("the document is empty", field="document", got=repr(document[:40]), wanted="text")
    found: dict[str, str] = {}
    for turn in range(rounds):
        asked = [_WORDINGS[turn % len(_WORDINGS)].format(line=line) for line in lines]
        prompts = [source.codec.render(text, document) for text in asked]
        check_length(max(map(len, prompts)) + _LONGEST_QUESTION, model.config.max_position_embeddings)
        answers = complete(
            model,
            prompts,
            _LONGEST_QUESTION,
            source.codec.eos_ids,
            temperature=0.0 if turn < len(_WORDINGS) else _TEMPERATURE,
            seed=seed + turn,
            progress=progress,
        )
        for answer in answers:
            question = question_in(source.codec.decode(answer))
            if question is not None:
                found.setdefault(query_key(question), question)
    if not found:
        raise CalibrationError(
            "the model wrote no question about the document",
            field="document",
            got=f"{rounds * len(lines)} answers, none with a question",
            wanted="at least one",
            fix="write the queries yourself and pass --queries, or use a larger model",
        )
    return list(found.values())


def statements(document: str) -> list[str]:
    """What there is to ask about: lines, and the sentences of those that have several, without list marks."""
    pieces = []
    for line in document.splitlines():
        text = re.sub(r"^\s*(?:[-*•#]+|\d+[.)])\s*", "", line).strip()
        pieces += [piece.strip() for piece in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", text)]
    return [piece for piece in pieces if sum(c.isalnum() for c in piece) >= 8]


def question_in(answer: str) -> str | None:
    """The first question of an answer, without quotes, labels and numbering; None if there is none."""
    for line in answer.splitlines():
        text = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line)
        # Sentences end, and labels do, where white space follows: 9:30, 3.5 kg and bluewhale42.example stay whole.
        for piece in re.split(r"(?<=[.!?:])[\"'“”]*\s+[\"'“”]*", text):
            if piece.rstrip("\"'”*").endswith("?") and len(piece.split()) >= 3:
                return piece.strip("\"'“”* ")
    return None

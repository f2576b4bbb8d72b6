"""Self-study: the base model writes the questions about a document that a patch is then fitted on.

A patch knows a fact only as far as the calibration queries ask about it. The model, which has the whole document in
context, is therefore asked about every line of the document: it has to write questions that the line answers. The
request has several wordings, and later answers are sampled, since a patch fitted on one greedy question per line would
know only one phrasing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tp_runtime.errors import CalibrationError, shown

from ..decoder import TorchPrefix
from ..rollout import Ending, check_prompts, complete
from ..source import Source
from .questions import query_key

# Requests for a question about a line. Each gives another kind of question.
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
    prefix: TorchPrefix | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return questions about `document`, without repetitions.

    The questions are ordered by round, and within a round by the lines of the document.

    Args:
        source: the base model, which must be a chat model.
        model: the same model, loaded.
        document: facts, rules or prose. The model is asked about every line, or about every sentence of a line that has
            several.
        rounds: the number of passes over the document; every round uses another wording or samples new answers.
        seed: the seed of the samples.
        prefix: the document's cached keys and values, so that it is not run for every question.
        progress: a function that is called with the number of answers just generated.

    Raises:
        CalibrationError: the document is empty, the model is completion-style, or none of its answers is a question.
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
        raise CalibrationError("the document is empty", field="document", got=shown(document), wanted="text")
    found: dict[str, str] = {}
    for number in range(rounds):
        asked = [_WORDINGS[number % len(_WORDINGS)].format(line=line) for line in lines]
        prompts = [source.codec.render(text, document) for text in asked]
        check_prompts(prompts, _LONGEST_QUESTION, model)
        answers = complete(
            model,
            prompts,
            _LONGEST_QUESTION,
            Ending.of(source.codec),
            temperature=0.0 if number < len(_WORDINGS) else _TEMPERATURE,
            seed=seed + number,
            prefix=prefix,
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
    """Return the lines of the document without list marks, each split into its sentences if it has several.

    Lines and sentences with fewer than eight letters or digits are left out.
    """
    sentences = []
    for line in document.splitlines():
        text = re.sub(r"^\s*(?:[-*•#]+|\d+[.)])\s*", "", line).strip()
        sentences += [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", text)]
    return [sentence for sentence in sentences if sum(c.isalnum() for c in sentence) >= 8]


def question_in(answer: str) -> str | None:
    """Return the first question of an answer without quotes, labels and numbering, or None if there is none."""
    for line in answer.splitlines():
        text = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line)
        # A mark ends a sentence or label only if white space follows: 9:30, 3.5 kg and bluewhale42.example stay whole.
        for part in re.split(r"(?<=[.!?:])[\"'“”]*\s+[\"'“”]*", text):
            if part.rstrip("\"'”*").endswith("?") and len(part.split()) >= 3:
                return part.strip("\"'“”* ")
    return None

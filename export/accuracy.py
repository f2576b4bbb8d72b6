"""Answers that can be right or wrong: what the prompted model gets right, and what of it the patched model keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import Patch

from .deltas import patched
from .prefix import torch_prefix
from .progress import bar
from .rollout import complete
from .source import Source


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions whose expected answer is in the free-running, greedy completion.

    Attributes:
        prompted, patched, unpatched: of the model with the context, with the patch, with neither.
        kept: of the questions that the prompted model gets right, those that the patched model gets right too; 1 where
            it gets none right.
        questions: how many.
    """

    prompted: float
    patched: float
    unpatched: float
    kept: float
    questions: int

    def to_dict(self) -> dict[str, float]:
        """For JSON, the names that say what they are."""
        values = asdict(self)
        return {f"accuracy_{key}": round(values[key], 4) for key in ("prompted", "patched", "unpatched", "kept")}


def load_answers(path: Path) -> dict[str, str]:
    """Query to expected answer, of a .jsonl file whose lines are {"query": text, "answer": text}; of others, nothing.

    Raises:
        CalibrationError: a line has other keys, or an empty answer.
    """
    if path.suffix.lower() != ".jsonl":
        return {}
    answers = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        entry = json.loads(line) if line.strip() else None
        if not isinstance(entry, dict):
            continue
        if set(entry) != {"query", "answer"} or not all(isinstance(v, str) and v.strip() for v in entry.values()):
            raise CalibrationError(
                "not a query with its answer",
                field=f"{path}, line {number}",
                got=line[:60],
                wanted='{"query": text, "answer": text}',
            )
        answers[entry["query"].strip()] = entry["answer"]
    return answers


def measure_accuracy(
    source: Source, model: Any, context: str, patch: Patch, answers: Mapping[str, str], max_new_tokens: int
) -> Accuracy:
    """Ask every question three ways; an answer counts where it holds the expected text, whatever the case.

    Raises:
        CalibrationError: there are no questions.
    """
    if not answers:
        raise CalibrationError("no questions with answers", field="queries", got=0, wanted="at least one")
    queries = list(answers)
    plain = [source.codec.render(query) for query in queries]
    framed = [source.codec.render(query, context) for query in queries]
    right = {}
    for name, prompts, under in (("prompted", framed, None), ("patched", plain, patch), ("unpatched", plain, None)):
        prefix = None if under is None else torch_prefix(under, model.device, model.dtype)
        with bar(f"answers, {name}", len(queries), "query") as shown, patched(model, under) if under else nullcontext():
            found = complete(model, prompts, max_new_tokens, source.codec.eos_ids, prefix=prefix, progress=shown.update)
        said = [source.codec.decode(completion).casefold() for completion in found]
        right[name] = [answers[query].casefold() in text for query, text in zip(queries, said, strict=True)]
    kept = [after for before, after in zip(right["prompted"], right["patched"], strict=True) if before]
    shares = {name: sum(of) / len(of) for name, of in right.items()}
    return Accuracy(**shares, kept=sum(kept) / len(kept) if kept else 1.0, questions=len(queries))

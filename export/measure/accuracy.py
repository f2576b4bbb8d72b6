"""Answers that can be right or wrong: what the prompted model gets right, and what of it the patched model keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from tp_runtime.errors import CalibrationError
from tp_runtime.generation import Sampling, generate
from tp_runtime.patch import Patch
from tp_runtime.session import Graph

from ..decoder import patched, torch_prefix
from ..progress import bar
from ..rollout import complete
from ..source import Source

Prompts = Sequence[Sequence[int]]
# (prompts, what to call the work) -> completions.
Answers = Callable[[Prompts, str], list[tuple[int, ...]]]


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


def torch_answers(source: Source, model: Any, patch: Patch | None, max_new_tokens: int) -> Answers:
    """Greedy answers by transformers."""

    def run(prompts: Prompts, label: str) -> list[tuple[int, ...]]:
        prefix = None if patch is None else torch_prefix(patch, model)
        with bar(label, len(prompts), "query") as shown, patched(model, patch) if patch else nullcontext():
            return complete(model, prompts, max_new_tokens, source.codec.eos_ids, prefix=prefix, progress=shown.update)

    return run


def runtime_answers(source: Source, graph: Graph, patch: Patch | None, max_new_tokens: int) -> Answers:
    """Greedy answers by tp_runtime: the exported graph, its precision and its slots are inside the figure."""
    bound = graph.bind(patch)

    def run(prompts: Prompts, label: str) -> list[tuple[int, ...]]:
        found = []
        with bar(label, len(prompts), "query") as shown:
            for prompt in prompts:
                ids = generate(
                    graph,
                    prompt,
                    bound,
                    sampling=Sampling(),
                    max_new_tokens=max_new_tokens,
                    eos_ids=source.codec.eos_ids,
                )
                found.append(tuple(ids))
                shown.update()
        return found

    return run


def measure_accuracy(
    source: Source, context: str, answers: Mapping[str, str], prompted: Answers, unpatched: Answers, patched: Answers
) -> Accuracy:
    """Ask every question three ways; an answer counts where it holds the expected text as whole words, in any case.

    Args:
        source: renders the questions.
        context: what the prompted model has in front.
        answers: query to expected answer.
        prompted, unpatched, patched: who answers; the first with the context in front.

    Raises:
        CalibrationError: there are no questions.
    """
    if not answers:
        raise CalibrationError("no questions with answers", field="queries", got=0, wanted="at least one")
    plain = [source.codec.render(query) for query in answers]
    framed = [source.codec.render(query, context) for query in answers]
    right = {}
    for name, who, prompts in (
        ("prompted", prompted, framed),
        ("unpatched", unpatched, plain),
        ("patched", patched, plain),
    ):
        said = [source.codec.decode(completion) for completion in who(prompts, f"answers, {name}")]
        right[name] = [
            re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE) is not None
            for wanted, text in zip(answers.values(), said, strict=True)
        ]
    kept = [after for before, after in zip(right["prompted"], right["patched"], strict=True) if before]
    shares = {name: sum(of) / len(of) for name, of in right.items()}
    return Accuracy(**shares, kept=sum(kept) / len(kept) if kept else 1.0, questions=len(answers))

"""The dialogues that a patch is fitted and measured on: the teacher's answers to queries, with the context in front."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from tp_runtime.errors import CalibrationError, RequestError

from ..progress import bar
from ..source import Source
from .completions import complete
from .sequences import Dialogue
from .store import RolloutStore

_SAMPLE_TEMPERATURE = 0.7


def dialogues_for(
    source: Source,
    model: Any,
    context: str | None,
    queries: Sequence[str],
    max_new_tokens: int,
    *,
    samples: int = 1,
    store: RolloutStore | None = None,
) -> list[Dialogue]:
    """Have the teacher answer `queries` with the context in front.

    Both prompts come from the model's own chat template, with the context as the system message and without any; a
    completion-style model gets context and query, or the bare query, after BOS. Without a context (None) both sides get
    the same prompts: what then tells them apart is the student's precision.

    Returns:
        The greedy answer to every query, then `samples` - 1 further rounds of sampled ones, each in the queries' order.

    Raises:
        CalibrationError: there are no queries, the context is empty, or every completion is empty.
        RequestError: a query cannot be rendered, or does not fit the context window.
    """
    if context is not None and not context.strip():
        raise CalibrationError("the prompt to absorb is empty", field="prompt", got=repr(context), wanted="text")
    if not queries:
        raise CalibrationError("no queries", field="queries", got=0, wanted="at least one", fix="pass more queries")
    teacher = [source.codec.render(query, context) for query in queries]
    student = [source.codec.render(query) for query in queries]
    check_length(max(map(len, teacher)) + max_new_tokens, model.config.max_position_embeddings)
    eos = source.codec.eos_ids
    completions = []
    with bar("teacher completions", samples * len(queries), "answer") as shown:
        for turn in range(samples):
            temperature = _SAMPLE_TEMPERATURE if turn else 0.0
            completions += complete(
                model,
                teacher,
                max_new_tokens,
                eos,
                temperature=temperature,
                seed=turn,
                store=store,
                progress=shown.update,
            )
    if all(set(completion) <= eos for completion in completions):
        raise CalibrationError(
            "every completion is empty",
            field="queries",
            got=f"{len(queries)} queries, no answer",
            wanted="queries that the prompted model answers",
            fix="look at the prompt: the model ends its turn at once",
        )
    prompts = [(tuple(t), tuple(s)) for t, s in zip(teacher, student, strict=True)]
    return [Dialogue(*pair, answer) for pair, answer in zip(prompts * samples, completions, strict=True)]


def check_length(longest: int, window: int) -> None:
    """Refuses tokens past the context window, which some models would answer with noise and GPT-2 with a crash.

    Raises:
        RequestError: `longest` tokens do not fit into `window`.
    """
    if longest > window:
        raise RequestError(
            "prompt, query and answer do not fit the context window",
            field="prompt",
            got=f"{longest} tokens",
            wanted=f"at most {window}",
            fix="shorten the prompt, or lower --max-new-tokens",
        )


def context_digest(context: str) -> str:
    """SHA-256 of the context text."""
    return hashlib.sha256(context.encode()).hexdigest()

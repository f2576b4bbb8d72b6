"""A context whose keys and values are computed once, for all the queries that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tp_runtime.errors import CalibrationError
from tp_runtime.text import Beginning, TextCodec, beginning_of, beginnings_of, writes_the_date

from ..decoder import TorchPrefix, cached_prompt
from .prompting import Prompting, PromptPair


@dataclass(frozen=True)
class Context:
    """A context whose keys and values are computed once.

    Attributes:
        prompting: how queries are asked with and without the context.
        beginning: the ids in which prompts with it and prompts without it differ; None if they differ elsewhere.
        cached: the keys and values of the beginning in the teacher's prompts; None without one beginning.
        window: the model's context window, which prompt and answer together have to fit.
    """

    prompting: Prompting
    beginning: Beginning | None
    cached: TorchPrefix | None
    window: int

    @classmethod
    def of(cls, model: Any, prompting: Prompting, prompts: Sequence[PromptPair]) -> Context:
        """Run a context once.

        Args:
            model: the base model, loaded.
            prompting: how queries are asked with and without the context.
            prompts: the two prompts of all queries that will follow it.
        """
        beginning = beginning_of(prompts)
        cached = None if beginning is None else cached_prompt(model, beginning.teacher, beginning.teacher)
        return cls(prompting, beginning, cached, model.config.max_position_embeddings)

    def entries(self) -> TorchPrefix:
        """Return all entries of the context, for the student's prompts.

        Raises:
            CalibrationError: prompts differ in more than one fixed beginning, so that entries cannot replace it.
        """
        if self.beginning is None or self.cached is None:
            raise no_beginning("different beginnings, or none")
        before_system = bool(self.prompting.systems)
        return TorchPrefix(self.cached.entries, self.beginning.student, self.cached.position, before_system)


def check_text(context: str) -> None:
    """Raise CalibrationError if the text of a context is empty."""
    if not context.strip():
        raise CalibrationError("the prompt to absorb is empty", field="prompt", got=repr(context), wanted="text")


def check_beginning(codec: TextCodec, prompts: Sequence[PromptPair]) -> Beginning:
    """Check that entries can stand in for the beginning of these prompts.

    Args:
        codec: what rendered the prompts.
        prompts: the two prompts of every query.

    Raises:
        CalibrationError: the prompts with and without the context differ in more than one fixed beginning, or the
            template writes the date, so that tomorrow's prompts begin differently.
    """
    beginning = beginning_of(prompts)
    if beginning is None:
        raise no_beginning(f"{len(beginnings_of(prompts))} different beginnings")
    if writes_the_date(codec.template_source):
        raise CalibrationError(
            "the chat template writes the date, so tomorrow's prompts would begin differently",
            field="--prefix",
            got="strftime_now in the template",
            wanted="a template whose beginning is the same every day",
            fix="fit a patch without entries: --prefix 0",
        )
    return beginning


def context_length(codec: TextCodec, prompts: Sequence[PromptPair]) -> int | None:
    """Return the number of ids in front of every query with the context; None if entries cannot replace them.

    The arguments are those of `check_beginning`.
    """
    try:
        return len(check_beginning(codec, prompts).teacher)
    except CalibrationError:
        return None


def no_beginning(got: str) -> CalibrationError:
    """Return the error for prompts whose beginning entries cannot replace."""
    return CalibrationError(
        "the prompts with and without the context do not differ in one fixed beginning",
        field="--prefix",
        got=got,
        wanted="a chat template (or a completion style) that puts the context in front of the query",
        fix="fit a patch without entries: --prefix 0",
    )

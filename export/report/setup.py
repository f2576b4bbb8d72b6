"""What a report is measured with and on: the models, the sizes, and the patches with their prompts and queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tp_runtime.errors import RequestError
from tp_runtime.patch import Patch
from tp_runtime.session import Graph

from ..measure import Answers, Completion, runtime_answers, torch_answers, within_stop
from ..queries import SystemMessages
from ..rollout import Prompting
from ..source import Source

LONG = 4  # the number of queries that long completions are written for


@dataclass(frozen=True)
class Subject:
    """One patch to report on, with the prompt that it replaces and the queries that it is measured on.

    Attributes:
        patch: the patch.
        file: the file that the patch was loaded from.
        context: the prompt that the patch replaces.
        queries: the held-out queries.
        fitted: the calibration queries; empty if they are not known.
        answers: the expected answers to those of the held-out queries whose answers are known.
        stop: the strings that end an answer.
        systems: the system messages that queries have of their own, in front of which the prompt stands; None if it
            stands in place of one.
    """

    patch: Patch
    file: Path
    context: str
    queries: list[str]
    fitted: list[str]
    answers: Mapping[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    systems: SystemMessages | None = None


@dataclass(frozen=True)
class Setup:
    """The models and sizes that every figure is measured with.

    Attributes:
        source: the base model.
        model: the same model, loaded with transformers.
        graph: the exported graph in a session; None if everything runs in torch.
        max_new_tokens: the largest number of tokens of the prompted model's answers, on which KL is measured.
        long: the largest number of tokens of the long completions; 0 leaves them out.
        methods: the methods to fit for comparison.
        frontier: the numbers of KV entries for the plot of fidelity against bytes; empty leaves the plot out.
        ranks: the ranks of weights in that plot; empty for the patch's own.
    """

    source: Source
    model: Any
    graph: Graph | None
    max_new_tokens: int
    long: int
    methods: tuple[str, ...]
    frontier: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def asked(self, subject: Subject) -> Prompting:
        """Return how queries are asked on which `subject` is measured."""
        return Prompting(self.source.codec, subject.context, subject.systems.held_out if subject.systems else ())

    def asked_fitted(self, subject: Subject) -> Prompting:
        """Return how the calibration queries are asked."""
        return Prompting(self.source.codec, subject.context, subject.systems.fitted if subject.systems else ())

    def in_torch(self, subject: Subject, patch: Patch | None, limit: int | None = None) -> Answers:
        """Return a function that generates answers with transformers, which end at the stop strings of `subject`.

        Args:
            subject: the patch to report on.
            patch: the patch to answer under, or None.
            limit: the largest number of tokens of an answer; None for `max_new_tokens`.
        """
        return torch_answers(self.source, self.model, patch, limit or self.max_new_tokens, subject.stop)

    def in_runtime(self, subject: Subject, patch: Patch | None) -> Answers:
        """Return a function that generates answers with the exported graph, or with transformers if there is none."""
        if self.graph is None:
            return self.in_torch(subject, patch)
        return runtime_answers(self.source, self.graph, patch, self.max_new_tokens, subject.stop)

    def text(self, subject: Subject, completion: Completion) -> str:
        """Return the text of a completion as a user sees it: before the first stop string, without white space."""
        return within_stop(self.source.codec.decode(completion), subject.stop).strip()


def check_long(setup: Setup, subject: Subject) -> None:
    """Check that the long completions fit the context window, before the minutes of work.

    Raises:
        RequestError: prompt, query and completion are longer than the context window.
    """
    asked = setup.asked(subject)
    longest = max(len(asked.teacher(query)) for query in subject.queries[:LONG])
    window = setup.model.config.max_position_embeddings
    if longest + setup.long > window:
        raise RequestError(
            "a long completion does not fit the context window",
            field="--long",
            got=f"{longest + setup.long} tokens with the prompt",
            wanted=f"at most {window}",
            fix="pass a smaller --long, or 0 to leave it out",
        )

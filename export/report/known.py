"""The held-out questions whose answers are known, and how many right answers each model gives and keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..measure import Answers, Closeness, Divergence, Prompts, Right, measure_closeness, right_answers, share_kept
from ..rollout import Dialogue
from ..source import Source
from .figures import HeldOut
from .setup import Setup, Subject


@dataclass(frozen=True)
class Known:
    """Questions with expected answers; there may be none.

    Attributes:
        source: the base model, whose codec decodes the answers.
        queries: the questions.
        plain: the ids of each question without the context.
        expected: the expected answer to each question.
        stop: the strings that end an answer.
        prompted: whether the prompted model answers each question correctly, [questions].
    """

    source: Source
    queries: list[str]
    plain: Prompts
    expected: list[str]
    stop: Sequence[str]
    prompted: Right

    @classmethod
    def of(cls, setup: Setup, subject: Subject, held: Sequence[Dialogue]) -> Known:
        """Return the questions of `subject` whose answers are known.

        Args:
            setup: the models.
            subject: the patch to report on, with the expected answers.
            held: the prompted model's dialogue for each of the queries.
        """
        chosen = [i for i, query in enumerate(subject.queries) if query in subject.answers]
        queries = [subject.queries[i] for i in chosen]
        expected = [subject.answers[query] for query in queries]
        given = [held[i].completion for i in chosen]
        right = right_answers(setup.source.codec, lambda *_: given, [], expected, subject.stop, "")
        return cls(setup.source, queries, [held[i].student_prompt for i in chosen], expected, subject.stop, right)

    def compare(
        self,
        unpatched: Divergence,
        model: Divergence,
        answers: Answers | None,
        label: str,
        prompts: Prompts | None = None,
    ) -> HeldOut:
        """Return the figures of one model on the held-out queries.

        Args:
            unpatched: the divergence of the model without a prompt and without a patch.
            model: the divergence of the model in question.
            answers: the free-running answers of the model; None for the prompted model, whose answers are known.
            label: the label of the progress bar.
            prompts: the ids of each question as this model sees it; None for the questions without the context.
        """
        close = measure_closeness(unpatched, model)
        if not self.queries:
            return held_out(close)
        right = self.prompted
        if answers is not None:
            asked = self.plain if prompts is None else prompts
            right = right_answers(self.source.codec, answers, asked, self.expected, self.stop, label)
        kept, error = share_kept(self.prompted, right)
        return held_out(close, float(right.mean()), kept, error)


def held_out(
    close: Closeness, right: float | None = None, kept: float | None = None, kept_se: float | None = None
) -> HeldOut:
    """Return the figures of `close` together with the shares of right answers and of answers kept."""
    return HeldOut(**vars(close), right=right, kept=kept, kept_se=kept_se)

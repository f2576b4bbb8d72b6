"""The two prompts of a query: the teacher's, with the context, and the student's, without it.

The model's own chat template renders both. Without system messages of its own a query has the context as its system
message, and the student has none. With them, the context stands in front of the query's system message in the same
message. For a completion-style model the context stands in front of the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from tp_runtime.text import Message, TextCodec, in_front_of

PromptPair = tuple[Sequence[int], Sequence[int]]
"""The ids of a query's prompt with the context, and of that without it."""

Asked = str | Sequence[Message]
"""A query, or the messages of a dialogue that opens with one."""


@dataclass(frozen=True)
class Prompting:
    """How queries are asked.

    Attributes:
        codec: the tokenizer and the chat template.
        context: the text in front, which only the teacher's prompts have. If it is None, both prompts are the same.
        systems: the system messages that queries have of their own; empty for none. The text of a query decides which
            of them it gets, so that a query has the same prompts wherever it is asked. A dialogue has that of the query
            it opens with, in every turn.
    """

    codec: TextCodec
    context: str | None
    systems: tuple[str, ...] = ()

    def teacher(self, query: Asked) -> list[int]:
        """Return the ids of the prompt with the context."""
        system = self.system(query)
        if system is None or self.context is None:
            return self.codec.render(query, system if self.context is None else self.context)
        return self.codec.render(query, in_front_of(system, self.context))

    def student(self, query: Asked) -> list[int]:
        """Return the ids of the prompt without the context."""
        return self.codec.render(query, self.system(query))

    def pairs(self, queries: Sequence[str]) -> list[PromptPair]:
        """Return the two prompts of each query."""
        return [(self.teacher(query), self.student(query)) for query in queries]

    def system(self, query: Asked) -> str | None:
        """Return the system message that a query has of its own; None if queries have none."""
        if not self.systems:
            return None
        opening = query if isinstance(query, str) else query[0]["content"]
        return self.systems[crc32(opening.encode()) % len(self.systems)]

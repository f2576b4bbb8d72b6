"""An answer as it is read: reasoning, text and calls of tools, told apart chunk by chunk.

This is the one object that a stream or a row of a batch needs: it gets the text that the decoder and the stop strings
let through, and says what part of the answer it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .reasoning import PromptTail, ReasoningSplitter, ReasoningTags
from .tool_calls import ToolCall, ToolFormat


class AnswerChunk(NamedTuple):
    """What a chunk adds to an answer.

    Attributes:
        text: more of the text.
        reasoning: more of the reasoning.
        tool_calls: the calls of the whole answer, at its end; empty before.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class AnswerReader:
    """Reads one answer chunk by chunk.

    Args:
        tags: the tags around reasoning; None if everything is text (`TextCodec.reasoning_tags`).
        tail: how the prompt ends (`TextCodec.prompt_tail`).
        notation: the notation of calls (`TextCodec.tool_format`); None looks for no calls, as when a request has no
            tools or its tool_choice is "none".
        names: the names of the request's tools.
    """

    def __init__(
        self,
        tags: ReasoningTags | None = None,
        tail: PromptTail = "none",
        notation: ToolFormat | None = None,
        names: Collection[str] = (),
    ) -> None:
        self._reasoning = ReasoningSplitter(tags, tail)
        self._notation, self._names = notation, tuple(names)

    def copy(self) -> AnswerReader:
        """Return a reader that continues from here, independently of this one."""
        made = object.__new__(AnswerReader)
        made.__dict__.update(self.__dict__)
        made._reasoning = self._reasoning.copy()
        return made

    def push(self, chunk: str) -> AnswerChunk:
        """Add a chunk of text and return what becomes certain with it. Text that may be a call is held back."""
        reasoning, text = self._reasoning.push(chunk)
        return AnswerChunk(text, reasoning)

    def end(self) -> AnswerChunk:
        """End the answer: return what was held back, and the calls."""
        reasoning, text = self._reasoning.flush()
        return AnswerChunk(text, reasoning)

"""An answer as it is read: reasoning, text and calls of tools, told apart chunk by chunk.

This is the one object that a stream or a row of a batch needs: it gets the text that the decoder and the stop strings
let through, and says what part of the answer it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .detokenize import overlap
from .reasoning import PromptTail, ReasoningSplitter, ReasoningTags
from .tool_calls import ToolCall, ToolFormat, first_opening, parse_tool_calls


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

    The chunks together are the answer's text without reasoning and calls, however the text was divided. From the first
    marker of a call on, text is held back until the end, because only then it is certain which of it are calls.

    Args:
        tags: the tags around reasoning; None if everything is text (`TextCodec.reasoning_tags`).
        tail: how the prompt ends (`TextCodec.prompt_tail`).
        form: the notation of calls (`TextCodec.tool_format`); None looks for no calls, as for a request without
            tools or with the tool_choice "none".
        tools: the tools of the request, as `checked_tools` returns them.
    """

    def __init__(
        self,
        tags: ReasoningTags | None = None,
        tail: PromptTail = "none",
        form: ToolFormat | None = None,
        tools: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._reasoning = ReasoningSplitter(tags, tail)
        self._form, self._tools = form, tuple(tools)
        self._held = ""
        self._begun = False  # whether any text was returned
        self._calling = False  # whether a call may have begun

    def copy(self) -> AnswerReader:
        """Return a reader that continues from here, independently of this one."""
        made = object.__new__(AnswerReader)
        made.__dict__.update(self.__dict__)
        made._reasoning = self._reasoning.copy()
        return made

    def push(self, chunk: str) -> AnswerChunk:
        """Add a chunk of text and return what becomes certain with it."""
        reasoning, text = self._reasoning.push(chunk)
        return AnswerChunk(text if self._form is None else self._certain(text, self._form), reasoning)

    def end(self) -> AnswerChunk:
        """End the answer: return what was held back, and the calls."""
        reasoning, text = self._reasoning.flush()
        if self._form is None:
            return AnswerChunk(text, reasoning)
        held, self._held = self._held + text, ""
        rest, calls = parse_tool_calls(held, self._form, self._tools)
        return AnswerChunk(rest, reasoning, tuple(calls))

    def _certain(self, text: str, form: ToolFormat) -> str:
        """Add text and return what no call can be part of, without the spaces at its end, which a call would drop."""
        self._held += text
        if self._calling:
            return ""
        notation = form.notation
        if notation.bare and not self._begun and self._held.lstrip()[:1] in ("{", "["):
            self._calling = True
            return ""
        end = first_opening(self._held, notation)
        self._calling = end >= 0
        if not self._calling:
            end = len(self._held) - max((overlap(self._held, opening) for opening in notation.openings), default=0)
        certain = self._held[:end].rstrip()
        self._held, self._begun = self._held[len(certain) :], self._begun or bool(certain)
        return certain

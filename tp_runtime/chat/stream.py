"""An answer of a chat while it is given: the text stream of a request, whose end appends the answer to the chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

from ..errors import BusyError
from ..session import Use
from ..text import Result, TextStream

_OWN_ENDS = ("eos", "stop", "length")  # the reasons for which an answer ends by itself


@dataclass(frozen=True)
class ChatResult(Result):
    """An answer that has ended.

    Attributes:
        dropped_turns: the number of the chat's oldest turns that the model did not see for this answer, because the
            context window was full (`overflow="drop_oldest"`).
    """

    dropped_turns: int = 0


class ChatStream:
    """An answer while it is given: an iterator over chunks of text.

    The message and its answer become part of the chat together, with the last chunk. If the stream is closed, dropped,
    interrupted or fails before that, the chat stays as it was, unless `stop` keeps what was said so far.

    One thread at a time may read the stream; any thread may close it at any time. In a `with` block it is closed at
    the end of the block.

    Attributes:
        text_stream: the stream of the request, with its figures; see TextStream.
        dropped_turns: see ChatResult.
    """

    def __init__(
        self, text_stream: TextStream, dropped_turns: int, append: Callable[[dict[str, Any]], None], use: Use
    ) -> None:
        self.text_stream, self.dropped_turns = text_stream, dropped_turns
        self._append, self._use = append, use
        self._said: list[str] = []
        self._state: Literal["open", "interrupted", "appended", "forgotten"] = "open"

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._said)

    @cached_property
    def result(self) -> ChatResult:
        """The answer with its figures.

        Raises:
            RequestError: the answer has not ended.
        """
        result = self.text_stream.result
        values = {one.name: getattr(result, one.name) for one in fields(result)}
        return ChatResult(**values, dropped_turns=self.dropped_turns)

    @property
    def finish_reason(self) -> str | None:
        """The reason for the end: "eos", "stop", "length" or "closed"; None before it."""
        return self.text_stream.finish_reason

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next chunk.

        Raises:
            StopIteration: the answer has ended, or the stream was closed.
            BusyError: another thread is reading the stream, or this one is further up.
        """
        try:
            chunk = next(self.text_stream)
            self._said.append(chunk)
            self._append_if_whole()
            return chunk
        except StopIteration:
            self._append_if_whole()
            if self._state == "open":  # it was closed
                self.close()
            raise
        except Exception as error:
            if not (isinstance(error, BusyError) and error.field == "stream"):  # else another thread goes on reading
                self.close()
            raise
        except BaseException:
            # A chunk may be lost here, so what follows is not the whole answer. `stop` can still keep what was said.
            if self._state == "open":
                self._state = "interrupted"
            raise

    def _append_if_whole(self) -> None:
        if self._state == "open" and self.finish_reason in _OWN_ENDS:
            self._append(answer_message(self.result))
            self._state = "appended"
            self._use.end()

    def stop(self) -> bool:
        """End the answer here, and make what was said so far the answer. After the end this has no effect.

        Returns:
            Whether the message and its answer are part of the chat. They are not if nothing was said, or if the stream
            was closed or failed before.
        """
        self.text_stream.close()
        if self.finish_reason is None:  # the reading was interrupted, or another thread still reads
            self.text_stream.finish_reason = "closed"
        if self._state in ("open", "interrupted") and self._said:
            self._append(answer_message(self.result))
            self._state = "appended"
        self.close()
        return self._state == "appended"

    def close(self) -> None:
        """End the answer and forget it together with its message. After the end this has no effect.

        If another thread is reading the stream at this moment, the reading ends with the token that is being computed.
        """
        if self._state != "appended":
            self._state = "forgotten"
        try:
            self.text_stream.close()
        finally:
            self._use.end()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answer_message(result: Result) -> dict[str, Any]:
    """Return an answer as the message that templates expect: reasoning and calls of tools beside the text."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text}
    if result.reasoning is not None:
        message["reasoning_content"] = result.reasoning
    if result.tool_calls:
        message["tool_calls"] = [call.message_entry() for call in result.tool_calls]
    return message

"""What a handler asks of the batch, the ticket of each answer, and the errors with which a request gets no ticket.

The worker's thread puts what an answer grows by into its ticket, and the handler reads it there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from ..errors import TPError
from ..text import AnswerChunk, Completion, Result, TokenInfo


class QueueFullError(TPError):
    """As many requests as may wait are waiting."""


class DrainingError(TPError):
    """The server is shutting down and accepts no more requests."""


class TimedOutError(TPError):
    """The request took longer than the server allows."""


class Asked(NamedTuple):
    """One answer that is asked for.

    Attributes:
        prompt: the prompt; see Request.
        options: the options of the request; see RequestOptions.
    """

    prompt: Any
    options: dict[str, Any]


class Piece(NamedTuple):
    """What an answer grows by.

    Attributes:
        chunk: the text, reasoning and calls.
        infos: the log-probabilities of the new tokens; empty unless the request wants them.
    """

    chunk: AnswerChunk
    infos: tuple[TokenInfo, ...] = ()


class Ticket:
    """One answer in the batch, as a handler in the event loop sees it.

    Its pieces wait here until the handler reads them; there are at most as many as the answer has tokens.

    Args:
        completion: the request's completion.
        label: the name of its patch, for the metrics.
        deadline: the time, by time.monotonic, at which it is stopped.
        loop: the event loop of the handler.
    """

    def __init__(self, completion: Completion, label: str, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        self.completion, self.label, self.deadline = completion, label, deadline
        self.cancelled = False
        self._loop = loop
        self._reader = completion.new_reader()
        self._sent = 0  # characters of the text that were handed on
        self._infos = 0  # tokens whose log-probabilities were handed on
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self.error: Exception | None = None  # why it ended, if that is an error

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what the answer grows by, until it ends.

        Raises:
            TimedOutError: the request took too long.
            Exception: the completion failed.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self.error is not None:
            raise self.error

    async def result(self) -> Result:
        """Wait for the end of the completion, and return its result. The errors are those of `pieces`."""
        async for _piece in self.pieces():
            pass
        return self.completion.result

    def cancel(self) -> None:
        """Let the request leave the batch before its next token. After its end this has no effect."""
        self.cancelled = True

    # -- called in the worker's thread ------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Hand on the text that the completion has grown by; return whether it has ended, which `finish` hands on."""
        reason, text = self.completion.finish_reason, self.completion.text
        grown, self._sent = text[self._sent :], len(text)
        infos = self.completion.token_infos(self._infos)
        self._infos += len(infos)
        if grown or infos:
            self._put(Piece(AnswerChunk(grown) if self._reader is None else self._reader.push(grown), infos))
        if reason is None:
            return False
        if self._reader is not None:
            self._put(Piece(self._reader.end()))
        return True

    def finish(self, error: Exception | None) -> None:
        """End the pieces, with an error if there is one."""
        self.error = error
        self._put(None)

    def _put(self, piece: Piece | None) -> None:
        if piece is None or any(piece.chunk) or piece.infos:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody reads this any more
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

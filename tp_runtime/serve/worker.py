"""The thread that runs all requests of a server in one continuous batch.

Handlers run in the event loop, and a step of a batch takes milliseconds, so one thread steps and hands what each step
gives to the tickets of its requests. A bounded number of requests waits. A ticket that is cancelled, or whose time is
over, leaves the batch before the next token.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from ..errors import TPError, library_text
from ..model import PatchedModel
from ..text import AnswerChunk, Completion, Result, TokenInfo

log = logging.getLogger("tp_runtime.serve")

_TRIES = 2  # of a step that fails: what a step did is kept, so the second try goes on from there
_LOOK_SECONDS = 0.25  # how long a thread that has nothing to run sleeps before it looks at deadlines again


class QueueFullError(TPError):
    """As many requests as may wait are waiting."""


class DrainingError(TPError):
    """The server is shutting down and accepts no more requests."""


class TimedOutError(TPError):
    """The request took longer than the server allows."""


class Piece(NamedTuple):
    """What an answer grows by.

    Attributes:
        chunk: the text, reasoning and calls.
        infos: the log-probabilities of the new tokens; empty unless the request wants them.
    """

    chunk: AnswerChunk
    infos: tuple[TokenInfo, ...] = ()


class Ticket:
    """One request in the batch, as a handler in the event loop sees it.

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
        self._error: Exception | None = None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what the answer grows by, until it ends.

        Raises:
            TimedOutError: the request took too long.
            Exception: the completion failed.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._error is not None:
            raise self._error

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
        """Hand on the text that the completion has grown by, and its end; return whether it has ended."""
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
        self.finish(self.completion.error)
        return True

    def finish(self, error: Exception | None) -> None:
        """End the pieces, with an error if there is one."""
        self._error = error
        self._put(None)

    def _put(self, piece: Piece | None) -> None:
        if (piece is None or any(piece.chunk) or piece.infos) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Worker:
    """Runs requests in one batch, in a thread of its own.

    Args:
        model: the open model.
        rows: the largest number of requests that run at the same time.
        queue: the largest number of requests that wait.
        timeout: the seconds that a request may take, waiting included.
        ended: called in the worker's thread with each ticket that has ended, and its error, for the metrics.
    """

    def __init__(
        self,
        model: PatchedModel,
        rows: int,
        queue: int,
        timeout: float,
        ended: Callable[[Ticket, Exception | None], object] = lambda ticket, error: None,
    ) -> None:
        self._batch = model.batch(rows)
        self._rows, self._most, self._timeout, self._ended = rows, rows + queue, timeout, ended
        self._tickets: list[Ticket] = []
        self._reserved = 0  # requests that are being encoded
        self._draining = self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tp-runtime batch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of requests that run."""
        return min(len(self._tickets), self._rows)

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return max(0, len(self._tickets) + self._reserved - self._rows)

    @property
    def accepting(self) -> bool:
        """Whether the worker accepts requests."""
        return self._thread.is_alive() and not self._draining

    def submit(self, prompt: Any, options: dict[str, Any], label: str, loop: asyncio.AbstractEventLoop) -> Ticket:
        """Add a request. This encodes its prompt and waits for the running step, so no event loop calls it.

        Args:
            prompt: see Request.
            options: the options of the request; see RequestOptions.
            label: the name of its patch, for the metrics.
            loop: the event loop of the handler that reads the ticket.

        Raises:
            QueueFullError: as many requests as may wait are waiting.
            DrainingError: the server is shutting down.
            RequestError, PatchError: the request is not valid.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            self._reserve()
        try:
            ticket = Ticket(self._batch.add(prompt, **options), label, deadline, loop)
        finally:
            with self._changed:
                self._reserved -= 1
        with self._changed:
            self._tickets.append(ticket)
            self._changed.notify()
        return ticket

    def drain(self, seconds: float) -> bool:
        """Accept no more requests, wait for those that run, and end the thread.

        Args:
            seconds: how long to wait; what then still runs is stopped.

        Returns:
            Whether all requests had ended.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            while (self._tickets or self._reserved) and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            clean = not self._tickets
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._batch.close()
        return clean

    def _reserve(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down", field="server", fix="send the request to another server")
        if len(self._tickets) + self._reserved >= self._most:
            raise QueueFullError(
                "the queue is full",
                field="server",
                got=f"{self._most} requests",
                wanted=f"fewer than {self._most}",
                fix="try again later, or start the server with a longer --queue or more --rows",
            )
        self._reserved += 1

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                while not self._tickets and not self._stopping:
                    self._changed.wait(_LOOK_SECONDS)
                if self._stopping:
                    self._leave(self._tickets, DrainingError("the server was shut down", field="server"))
                    return
                tickets = list(self._tickets)
            now = time.monotonic()
            self._leave([ticket for ticket in tickets if ticket.cancelled], None)
            tickets = [ticket for ticket in tickets if not ticket.cancelled]
            self._leave([ticket for ticket in tickets if now > ticket.deadline], self._timed_out())
            tickets = [ticket for ticket in tickets if now <= ticket.deadline]
            try:
                self._batch.step()
                failures = 0
            except Exception as error:
                failures += 1
                log.exception("a step of the batch failed")
                if failures == _TRIES:
                    failures = 0
                    self._leave(tickets, RuntimeError(f"a step of the model failed: {library_text(error)}"))
                    continue
            self._forget([ticket for ticket in tickets if ticket.advance()])

    def _leave(self, tickets: list[Ticket], error: Exception | None) -> None:
        """Take requests out of the batch before their end."""
        for ticket in tickets:
            ticket.completion.close()
            ticket.finish(error)
            self._ended(ticket, error)
        self._remove(tickets)

    def _forget(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._ended(ticket, ticket.completion.error)
        self._remove(tickets)

    def _remove(self, tickets: list[Ticket]) -> None:
        if tickets:
            with self._changed:
                self._tickets = [ticket for ticket in self._tickets if ticket not in tickets]
                self._changed.notify_all()

    def _timed_out(self) -> TimedOutError:
        return TimedOutError(
            "the request took too long",
            field="server",
            got=f"more than {self._timeout:g} seconds",
            wanted=f"at most {self._timeout:g} seconds",
            fix="ask for fewer tokens, or start the server with a longer --timeout",
        )

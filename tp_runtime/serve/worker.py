"""The thread that runs all requests of a server in one continuous batch.

Handlers run in the event loop, and a step of a batch takes milliseconds, so one thread steps and hands what each step
gives to the tickets of its requests. A bounded number of requests waits: a handler reserves places for all of its
answers, or is refused, before anything is encoded. A ticket that is cancelled, or whose time is over, leaves the batch
before the next token. Whatever fails, every ticket ends: a handler that waits for one never waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from ..errors import RequestError, library_text
from ..model import PatchedModel
from ..text import Completion
from .ticket import Asked, DrainingError, QueueFullError, Ticket, TimedOutError

log = logging.getLogger("tp_runtime.serve")

_TRIES = 2  # of a step that fails: what a step did is kept, so the second try goes on from there
_LEAVE_SECONDS = 5.0  # for the step that runs when the thread is told to end
# A thread that frees a lock and takes it again at once can keep it from the others for ever. So between two steps the
# thread of the batch sleeps this long while requests wait to be added.
_GIVE_WAY_SECONDS = 0.0005


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
        self._reserved = 0  # places of answers that are being encoded
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

    # -- requests ---------------------------------------------------------------------------------------------------

    def reserve(self, answers: int) -> float:
        """Reserve places for answers, all or none; this takes no time. `submit` or `release` gives them back.

        Returns:
            The deadline of the answers, by time.monotonic.

        Raises:
            RequestError: there are more answers than the server has places.
            QueueFullError: not that many places are free.
            DrainingError: the server is shutting down.
        """
        with self._changed:
            if not self.accepting:
                raise _shutting_down()
            if answers > self._most:
                raise RequestError(
                    "the request asks for more answers than the server has places",
                    field="n",
                    got=answers,
                    wanted=f"at most {self._most}, for all prompts together",
                    fix="send several requests, or start the server with a longer --queue",
                )
            if len(self._tickets) + self._reserved + answers > self._most:
                raise QueueFullError(
                    "the queue is full",
                    field="server",
                    got=f"{len(self._tickets) + self._reserved} requests, and {answers} more",
                    wanted=f"at most {self._most}",
                    fix="try again later, or start the server with a longer --queue or more --rows",
                )
            self._reserved += answers
        return time.monotonic() + self._timeout

    def release(self, answers: int) -> None:
        """Give back places that were reserved and not used."""
        with self._changed:
            self._reserved -= answers
            self._changed.notify_all()

    def submit(
        self, asked: Sequence[Asked], label: str, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> list[Ticket]:
        """Add answers whose places are reserved, all or none, and give the places back.

        This encodes their prompts and waits for the running step, so no event loop calls it.

        Args:
            asked: the answers.
            label: the name of their patch, for the metrics.
            deadline: what `reserve` returned.
            loop: the event loop of the handler that reads the tickets.

        Raises:
            TimedOutError: the time was over before all prompts were encoded.
            DrainingError: the server was shut down meanwhile.
            RequestError, PatchError: a request is not valid.
        """
        completions: list[Completion] = []
        try:
            for prompt, options in asked:
                if time.monotonic() > deadline:
                    raise self._timed_out()
                completions.append(self._batch.add(prompt, **options))
            tickets = [Ticket(completion, label, deadline, loop) for completion in completions]
            with self._changed:
                if self._stopping:
                    raise _shutting_down()
                self._tickets += tickets
                self._reserved -= len(asked)
                self._changed.notify_all()
            return tickets
        except BaseException as error:
            self.release(len(asked))
            for completion in completions:
                completion.close()
            if self._stopping and isinstance(error, RequestError):  # the batch is closed
                raise _shutting_down() from error
            raise

    # -- the end ----------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Accept no more requests. Those that were accepted run on."""
        with self._changed:
            self._draining = True

    def drain(self, seconds: float) -> bool:
        """Accept no more requests, wait for those that run, and end the thread. A second call has no effect.

        Args:
            seconds: how long to wait; what then still runs is stopped.

        Returns:
            Whether all requests had ended.
        """
        self.refuse()
        end = time.monotonic() + seconds
        with self._changed:
            while self._thread.is_alive() and (self._tickets or self._reserved):
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            clean = not self._tickets and not self._reserved
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_LEAVE_SECONDS)
        if self._thread.is_alive():
            log.warning("a step of the model still runs and is abandoned")  # its thread ends with the process
        else:
            self._batch.close()
        return clean

    # -- called in the worker's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = _shutting_down()
        try:
            self._serve()
        except BaseException as failure:  # a library in Rust may panic; nothing else ends this thread before its time
            log.critical("the thread of the batch failed, and the server accepts no more requests", exc_info=failure)
            error = RuntimeError(f"the thread of the batch failed: {library_text(failure)}")
        with self._changed:
            self._draining = self._stopping = True
            left = list(self._tickets)
        self._leave(left, error)

    def _serve(self) -> None:
        failures = 0
        while True:
            with self._changed:
                while not self._tickets and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                tickets = list(self._tickets)
                wanted = self._reserved
            now = time.monotonic()
            self._leave([ticket for ticket in tickets if ticket.cancelled], None)
            tickets = [ticket for ticket in tickets if not ticket.cancelled]
            for ticket in [ticket for ticket in tickets if now > ticket.deadline]:
                self._leave([ticket], self._timed_out())
                tickets.remove(ticket)
            try:
                if tickets:
                    self._batch.step()
                failures = 0
            except BaseException as error:  # in this thread no signal raises
                failures += 1
                log.error("a step of the batch failed", exc_info=error)
                if failures == _TRIES:
                    failures = 0
                    self._leave(tickets, RuntimeError(f"a step of the model failed: {library_text(error)}"))
                    continue
            ended = [ticket for ticket in tickets if self._advance(ticket)]
            self._end([(ticket, ticket.completion.error) for ticket in ended])
            if wanted:
                time.sleep(_GIVE_WAY_SECONDS)

    def _advance(self, ticket: Ticket) -> bool:
        """Hand on what a ticket has grown by; return whether it has ended. If that fails, only this ticket leaves."""
        try:
            return ticket.advance()
        except BaseException as error:
            log.error("an answer could not be read", exc_info=error)
            self._leave([ticket], RuntimeError(f"the answer could not be read: {library_text(error)}"))
            return False

    def _leave(self, tickets: Sequence[Ticket], error: Exception | None) -> None:
        """Take answers out of the batch before their end."""
        for ticket in tickets:
            try:
                ticket.completion.close()
            except BaseException as failure:  # the others must leave all the same
                log.error("an answer could not be closed", exc_info=failure)
        self._end([(ticket, error) for ticket in tickets])

    def _end(self, ended: Sequence[tuple[Ticket, Exception | None]]) -> None:
        """Give back the places of answers that have ended, count them, and then let their handlers know.

        A client that has its answer finds its place free, and finds the answer among the metrics.
        """
        self._remove([ticket for ticket, _error in ended])
        for ticket, error in ended:
            try:
                self._ended(ticket, error)
            except Exception as failure:
                log.error("the metrics of an answer could not be counted", exc_info=failure)
            ticket.finish(error)

    def _remove(self, tickets: Sequence[Ticket]) -> None:
        if tickets:
            gone = set(tickets)
            with self._changed:
                self._tickets = [ticket for ticket in self._tickets if ticket not in gone]
                self._changed.notify_all()

    def _timed_out(self) -> TimedOutError:
        return TimedOutError(
            "the request took too long",
            field="server",
            got=f"more than {self._timeout:g} seconds",
            wanted=f"at most {self._timeout:g} seconds",
            fix="ask for fewer tokens, or start the server with a longer --timeout",
        )


def _shutting_down() -> DrainingError:
    return DrainingError(
        "the server is shutting down",
        field="server",
        got="a request during shutdown",
        wanted="a server that is ready (GET /ready)",
        fix="send the request to another server, or again later",
    )

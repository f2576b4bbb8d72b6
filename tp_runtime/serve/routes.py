"""The routes of OpenAI's API, for requests that run in one batch under any of the loaded patches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from ..text import Result
from .answers import ChatCompletion, TextCompletion
from .failures import documented, error_body
from .patches import ServedPatches
from .requests import answer_options, chat_options, completion_options
from .responses import Answering, event
from .schema import ChatBody, CompletionBody, Sampled
from .settings import ServerSettings
from .ticket import Asked, Ticket
from .worker import Worker

_ENCODERS = 4  # threads that encode prompts: tokenizers and llguidance work outside Python's lock
_GONE = 499  # what a log says of a request whose client has hung up
_LOOK_SECONDS = 0.2  # how often a request that does not stream looks whether its client is still there


class Completions:
    """The handlers of completions.

    Args:
        worker: runs the requests.
        patches: what requests can name.
        settings: the server's settings.
        fingerprint: says which graph makes the answers.
    """

    def __init__(self, worker: Worker, patches: ServedPatches, settings: ServerSettings, fingerprint: str) -> None:
        self._worker, self._patches, self._settings, self._fingerprint = worker, patches, settings, fingerprint
        self._encoders = ThreadPoolExecutor(_ENCODERS, "tp-runtime encoder")

    def close(self) -> None:
        """End the threads that encode prompts."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(prefix="/v1")

        @router.post(
            "/chat/completions", response_model=None, summary="Answer a chat", responses=_documented(ChatCompletion)
        )
        async def chat(body: ChatBody, request: Request) -> Response:
            options = chat_options(body, self._settings.max_tokens)
            return await self._answer(request, body, [body.messages], options, [""])

        @router.post(
            "/completions", response_model=None, summary="Continue a text", responses=_documented(TextCompletion)
        )
        async def completions(body: CompletionBody, request: Request) -> Response:
            options = completion_options(body, self._settings.max_tokens)
            prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
            before = prompts if body.echo else [""] * len(prompts)
            return await self._answer(request, body, prompts, options, before)

        return router

    async def _answer(
        self, request: Request, body: Sampled, prompts: Sequence[Any], options: dict[str, Any], before: Sequence[str]
    ) -> Response:
        """Run a request, and answer with a body or a stream.

        Args:
            request: the HTTP request.
            body: its body.
            prompts: the prompts; each gets `n` answers.
            options: the options of each answer.
            before: for each prompt, the text in front of its answers.
        """
        tickets, label = await self._submit(prompts, body, options)
        request.state.label, request.state.tickets = label, tickets
        answering = Answering.begin(body.model, self._fingerprint, isinstance(body, ChatBody))
        texts = [text for text in before for _answer in range(body.n)]
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(tickets, answering, texts, len(prompts), with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        results = await _results(request, tickets)
        if results is None:
            return Response(status_code=_GONE)
        return JSONResponse(answering.body(results, len(prompts), texts))

    async def _submit(self, prompts: Sequence[Any], body: Sampled, options: dict[str, Any]) -> tuple[list[Ticket], str]:
        """Add every answer to the batch, or none of them; return them and the name of their patch."""
        loop, answers = asyncio.get_running_loop(), len(prompts) * body.n
        deadline = self._worker.reserve(answers)

        def submit() -> tuple[list[Ticket], str]:
            try:
                choice, label = self._patches.choice(body.model, body.patch)
                asked = [
                    Asked(prompt, answer_options({**options, "patch": choice}, answer))
                    for prompt in prompts
                    for answer in range(body.n)
                ]
            except BaseException:
                self._worker.release(answers)
                raise
            return self._worker.submit(asked, label, deadline, loop), label

        try:
            added = loop.run_in_executor(self._encoders, submit)
        except BaseException:
            self._worker.release(answers)
            raise
        try:
            return await asyncio.shield(added)
        except asyncio.CancelledError:
            added.add_done_callback(_cancel)
            raise


def _cancel(added: asyncio.Future[tuple[list[Ticket], str]]) -> None:
    """Cancel the tickets of a request whose handler has ended before it got them."""
    if not added.cancelled() and added.exception() is None:
        for ticket in added.result()[0]:
            ticket.cancel()


async def _results(request: Request, tickets: Sequence[Ticket]) -> list[Result] | None:
    """Wait for all results; if the client hangs up before, stop the requests and return None."""
    waiting = asyncio.gather(*(ticket.result() for ticket in tickets))
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=_LOOK_SECONDS)
            if not waiting.done() and await request.is_disconnected():
                return None
        return list(await waiting)
    finally:
        for ticket in tickets:
            ticket.cancel()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await waiting


async def _events(
    tickets: Sequence[Ticket], answering: Answering, before: Sequence[str], prompts: int, with_usage: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of a response whose answers grow at the same time.

    A client that hangs up cancels the task that reads this. The events that wait are at most those of the tickets.
    """
    events: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def read(index: int, ticket: Ticket) -> None:
        try:
            events.put_nowait(answering.first(index, before[index]))
            async for piece in ticket.pieces():
                events.put_nowait(answering.grown(index, piece.chunk, piece.infos))
            events.put_nowait(answering.last(index, ticket.completion.result))
        except Exception as error:
            events.put_nowait(error)
        finally:
            events.put_nowait(None)

    readers = [asyncio.create_task(read(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(readers)
        while left:
            found = await events.get()
            if isinstance(found, Exception):
                yield event(error_body(found)[1])
                return
            if found is None:
                left -= 1
            else:
                yield found
        yield answering.end([ticket.completion.result for ticket in tickets], prompts, with_usage)
    finally:
        for ticket in tickets:
            ticket.cancel()
        for reader in readers:
            reader.cancel()


def _documented(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    data = {"type": "string", "description": "a chunk as JSON, or [DONE] at the end"}
    stream = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}}
    answer = {"model": body, "description": "The answer; with `stream`, its chunks as events.", "content": stream}
    return {200: answer, **documented(400, 404, 408, 413, 503, 504)}

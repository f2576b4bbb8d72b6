"""The routes of OpenAI's API, for requests that run in one batch under any of the loaded patches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ..patch import Patch
from ..text import Result
from .cards import patch_facts
from .failures import error_body
from .patches import ServedPatches
from .requests import answer_options, chat_options, completion_options
from .responses import Answering, event
from .schema import ChatBody, CompletionBody, Json, Sampled
from .settings import ServerSettings
from .worker import Ticket, Worker

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

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(prefix="/v1")

        @router.post("/chat/completions", response_model=None, summary="Answer a chat")
        async def chat(body: ChatBody, request: Request) -> Response:
            options = chat_options(body, self._settings.max_tokens)
            return await self._answer(request, body, [body.messages], options, [""])

        @router.post("/completions", response_model=None, summary="Continue a text")
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
        choice, label = self._patches.choice(body.model, body.patch)
        tickets = await self._submit(prompts, body.n, {**options, "patch": choice}, label)
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

    async def _submit(self, prompts: Sequence[Any], n: int, options: dict[str, Any], label: str) -> list[Ticket]:
        """Add every answer to the batch, or none of them."""
        loop = asyncio.get_running_loop()
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                for answer in range(n):
                    own = answer_options(options, answer)
                    added = loop.run_in_executor(self._encoders, self._worker.submit, prompt, own, label, loop)
                    tickets.append(await asyncio.shield(added))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets


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

    Starlette closes the generator when the client hangs up.
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


def model_card(name: str, patch: Patch | None, created: int) -> Json:
    """Return the entry of /v1/models for the model itself or for a patch: what it is, can and keeps."""
    card: Json = {"id": name, "object": "model", "created": created, "owned_by": "tp-runtime"}
    if patch is None:
        return card
    shown = patch.capabilities
    return {
        **card,
        "patch": {
            "name": patch.name,
            "identity": patch.identity,
            "bytes": patch.nbytes,
            "method": patch.config.method,
            "fidelity": patch.config.fidelity,
            "stop": list(patch.config.stop),
            "capabilities": {
                "form": shown.form,
                "strength": shown.strength,
                "sums": shown.sums,
                "system": shown.system,
                "precision": shown.precision,
            },
            **patch_facts(patch),
        },
    }

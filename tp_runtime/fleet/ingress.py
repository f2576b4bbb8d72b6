"""The ingress: it reads what a request names, hands it to a replica that suits, and sends the response on.

A request of which no byte has been sent is handed to another replica if its own is lost. One that has begun to answer
cannot be: the client would see its beginning twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..serve import Guard, Refusal, ServerSettings, body_not_whole, body_too_large, refusal_body
from .messages import Call, Head

log = logging.getLogger("tp_runtime.fleet")

_HOP = {b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"upgrade"}
_LOST = (RayError, ReplicaUnavailableError, DeploymentUnavailableError)
_PAUSE_SECONDS = 0.5  # before another replica is tried: Ray takes a moment to notice that one is gone
_GONE = 499  # the status for a client that has hung up, which nobody reads
_RETRY = {"Retry-After": "1"}


@serve.deployment  # type: ignore[untyped-decorator]
class Ingress:
    """Hands requests to replicas.

    Args:
        replicas: the handle of the replicas.
        tries: how often a request is handed to a replica before it fails.
        settings: what the replicas accept. The ingress checks names, keys and sizes before a replica is asked.
    """

    def __init__(self, replicas: DeploymentHandle, tries: int, settings: ServerSettings) -> None:
        self._replicas, self._tries = replicas.options(method_name="call", stream=True), tries
        self._most, self._stall, self._timeout = settings.body_bytes, settings.stall, settings.timeout
        self._guard = Guard(_nothing, settings, lambda status: None)

    async def __call__(self, request: Request) -> Response:
        """Answer any request by a replica."""
        refusal = self._guard.refusal(request.scope, dict(request.headers.raw))
        if refusal is not None:
            return _refused(refusal)
        body = bytearray()
        try:
            async with asyncio.timeout(self._stall):
                async for part in request.stream():
                    body += part
                    if len(body) > self._most:
                        return _refused(body_too_large(self._most))
        except TimeoutError:
            return _refused(body_not_whole(self._stall))
        except ClientDisconnect:
            return Response(status_code=_GONE)
        headers = tuple((name, value) for name, value in request.headers.raw if name not in _HOP)
        headers += ((b"content-length", str(len(body)).encode()),)
        scope = request.scope
        return await self._answer(Call(request.method, scope["path"], scope["query_string"], headers, bytes(body)))

    async def _answer(self, call: Call) -> Response:
        handle = self._replicas.options(multiplexed_model_id=call.affinity())
        for attempt in range(1, self._tries + 1):
            pieces: Any = handle.remote(call)
            try:
                async with asyncio.timeout(self._timeout):
                    head = await anext(aiter(pieces))
                    first = await anext(aiter(pieces), None)
            except BackPressureError:
                return _refused(Refusal(429, "the queue is full", field="server", fix="try again later"))
            except TimeoutError:
                pieces.cancel()
                wanted = f"at most {self._timeout:g} seconds"
                return _refused(Refusal(504, "the request took too long", field="server", wanted=wanted))
            except RayTaskError:  # the replica lives, and failed on this request as it would again
                log.exception("a replica failed on a request")
                return _refused(Refusal(500, "the replica failed; its log says more"))
            except _LOST as error:
                pieces.cancel()
                log.warning("a replica was lost before it answered, try %d: %s", attempt, type(error).__name__)
                await asyncio.sleep(_PAUSE_SECONDS * attempt)
                continue
            except BaseException:  # the client has hung up
                pieces.cancel()
                raise
            assert isinstance(head, Head)
            response = StreamingResponse(_body(pieces, first), head.status)
            response.raw_headers = [(name, value) for name, value in head.headers if name not in _HOP]
            return response
        return _refused(Refusal(503, "no replica could answer", field="server", fix="try again later"))


async def _body(pieces: Any, first: bytes | None) -> AsyncIterator[bytes]:
    """Yield the pieces of a body. A client that hangs up cancels the request in its replica."""
    try:
        if first is not None:
            yield first
            async for piece in pieces:
                yield piece
    finally:
        pieces.cancel()


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Do nothing: the ingress asks the guard, and has no application."""


def _refused(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal_body(refusal), refusal.status, _RETRY if refusal.status in (429, 503) else None)

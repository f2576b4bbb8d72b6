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
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .messages import Call, Head

log = logging.getLogger("tp_runtime.fleet")

_HOP = {b"host", b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"upgrade"}
_LOST = (RayError, ReplicaUnavailableError, DeploymentUnavailableError)
_PAUSE_SECONDS = 0.5  # before another replica is tried: Ray takes a moment to notice that one is gone


@serve.deployment  # type: ignore[untyped-decorator]
class Ingress:
    """Hands requests to replicas.

    Args:
        replicas: the handle of the replicas.
        tries: how often a request is handed to a replica before it fails.
        body_bytes: the largest size of a body.
    """

    def __init__(self, replicas: DeploymentHandle, tries: int, body_bytes: int) -> None:
        self._replicas, self._tries, self._most = replicas.options(method_name="call", stream=True), tries, body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer any request by a replica."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._most:
                return _failure(413, f"the body is larger than {self._most} bytes", "invalid_request_error")
        headers = tuple((name, value) for name, value in request.headers.raw if name not in _HOP)
        headers += ((b"host", b"localhost"), (b"content-length", str(len(body)).encode()))
        call = Call(request.method, request.url.path, request.url.query.encode(), headers, bytes(body))
        return await self._answer(call)

    async def _answer(self, call: Call) -> Response:
        handle = self._replicas.options(multiplexed_model_id=call.affinity())
        for attempt in range(1, self._tries + 1):
            pieces: Any = handle.remote(call)
            try:
                head = await anext(aiter(pieces))
                first = await anext(aiter(pieces), None)
            except BackPressureError:
                return _failure(429, "the queue is full", "rate_limit_error", {"Retry-After": "1"})
            except _LOST as error:
                log.warning("a replica was lost before it answered, try %d: %s", attempt, type(error).__name__)
                await asyncio.sleep(_PAUSE_SECONDS * attempt)
                continue
            assert isinstance(head, Head)
            response = StreamingResponse(_body(pieces, first), head.status)
            response.raw_headers = [(name, value) for name, value in head.headers if name not in _HOP]
            return response
        return _failure(503, "no replica could answer", "server_error", {"Retry-After": "1"})


async def _body(pieces: Any, first: bytes | None) -> AsyncIterator[bytes]:
    """Yield the pieces of a body. A client that hangs up cancels the request in its replica."""
    try:
        if first is not None:
            yield first
            async for piece in pieces:
                yield piece
    finally:
        pieces.cancel()


def _failure(status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, headers)

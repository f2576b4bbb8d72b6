"""What stands in front of every route: API keys, the size of bodies, the names of hosts, request ids and logs.

It is plain ASGI, because a body that is too large must be refused while it arrives.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("tp_runtime.serve.access")

_OPEN = ("/health", "/ready")  # a load balancer has no key
_PAGE = ("/", "/static/")  # the page asks for a key and sends it itself


class Guard:
    """Checks requests before they reach the application, and logs them.

    Args:
        app: the application.
        api_keys: the keys of which a request has to send one as a bearer; none serves every request.
        hosts: the names by which the server may be called; a page of another site cannot reach it by a name of its own.
            None allows every name.
        body_bytes: the largest size of a body.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], hosts: frozenset[str] | None, body_bytes: int) -> None:
        self._app, self._keys = app, [key.encode() for key in api_keys]
        self._hosts, self._most = hosts, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, headers = time.perf_counter(), 500, dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if given.isalnum() and len(given) <= 64 else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise _TooLargeError
            return message

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._app(scope, counted, marked)
            else:
                await _refuse(marked, *refusal)
        except _TooLargeError:
            await _refuse(marked, 413, f"the body is larger than {self._most} bytes", "invalid_request_error")
        finally:
            self._log(scope, request_id, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]").lower()
        if self._hosts is not None and host not in self._hosts:
            return 421, "the server is not called by this name", "invalid_request_error"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            return 413, f"the body is larger than {self._most} bytes", "invalid_request_error"
        path = scope["path"]
        if not self._keys or path in _OPEN or path == _PAGE[0] or path.startswith(_PAGE[1]):
            return None
        scheme, _space, key = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, so that the time does not say which one was close.
        good = [hmac.compare_digest(key, own) for own in self._keys]
        if scheme.lower() != b"bearer" or not any(good):
            return 401, "the API key is missing or wrong", "authentication_error"
        return None

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        state = scope["state"]
        entry: dict[str, Any] = {
            "request": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        if "label" in state:
            entry["patch"] = state["label"]
            entry["prompt_tokens"] = sum(ticket.completion.prompt_tokens for ticket in state["tickets"])
            entry["completion_tokens"] = sum(len(ticket.completion.token_ids) for ticket in state["tickets"])
        log.info("%s", json.dumps(entry))


class _TooLargeError(Exception):
    pass


async def _refuse(send: Send, status: int, message: str, kind: str) -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

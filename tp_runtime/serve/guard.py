"""What stands in front of every route: keys, limits, the names of hosts, request ids, logs, and what fails.

It is plain ASGI, because a body that is too large must be refused while it arrives, and because a client that takes
nothing of its answer can be noticed only where the answer is sent.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import Refusal, failure_body, refusal_body
from .logs import REQUEST_ID
from .settings import ServerSettings, is_loopback

log = logging.getLogger("tp_runtime.serve")

_OPEN = frozenset(("/health", "/ready"))  # a load balancer has no key
# The page asks for a key and sends it itself. The documentation holds nothing of the server's.
_PAGES = frozenset(("/", "/docs", "/redoc", "/openapi.json"))
_FILES = ("/static/", "/static-offline-docs/")
_SPARE_REQUESTS = 64  # beside those that run and wait: pages, metrics, and bodies that arrive
_GONE = 499  # what a log says of a request whose client has hung up or takes nothing


class Guard:
    """Checks requests before they reach the application, and logs them.

    Args:
        app: the application.
        settings: the settings of the server.
        answered: called with the status of each answer, for the metrics.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, answered: Callable[[int], object]) -> None:
        self._app, self._answered = app, answered
        self._keys = [key.encode() for key in settings.api_keys]
        self._most, self._stall = settings.body_bytes, settings.stall
        self._hosts = _names(settings)
        self._open, self._most_open = 0, settings.rows + settings.queue + _SPARE_REQUESTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope.setdefault("state", {})
        exchange = _Exchange(receive, send, self._most, self._stall, _request_id(headers))
        start = time.perf_counter()
        REQUEST_ID.set(exchange.request_id)
        self._open += 1
        try:
            refusal = self.refusal(scope, headers)
            if refusal is None:
                await self._app(scope, exchange.receive, exchange.send)
            else:
                await exchange.refuse(refusal)
        except _StoppedError:
            pass  # the refusal has been sent, or nobody takes an answer
        except Exception as error:
            log.error("the request failed", exc_info=error)
            await exchange.fail()
        finally:
            self._open -= 1
            # Whatever ended the request, nothing of it runs on.
            for ticket in scope["state"].get("tickets", ()):
                ticket.cancel()
            self._answered(exchange.status)
            _log(scope, exchange.status, time.perf_counter() - start)

    def refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Refusal | None:
        """Return why a request is refused before it is read; None if it is not."""
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            return Refusal(
                421,
                "the server is not called by this name",
                field="host",
                got=host,
                wanted=", ".join(sorted(self._hosts)),
                fix="call it by one of these, or start it with --host-name",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self._most):
            return body_too_large(self._most)
        path = scope["path"]
        if path in _OPEN:
            return None
        if self._open > self._most_open:
            return Refusal(
                429,
                "the server has too many open requests",
                field="server",
                got=str(self._open),
                wanted=f"at most {self._most_open}",
                fix="try again later",
            )
        if not self._keys or path in _PAGES or path.startswith(_FILES):
            return None
        scheme, _space, key = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, so that the time does not say which one was close.
        good = [hmac.compare_digest(key.strip(), own) for own in self._keys]
        if scheme.lower() != b"bearer" or not any(good):
            return Refusal(
                401,
                "the API key is missing or wrong",
                field="authorization",
                got="another key" if key else "no key",
                wanted="Bearer and a key of the server",
                fix="send the header Authorization: Bearer KEY (api_key= in the openai client)",
            )
        return None


class _Exchange:
    """One request and its answer, with limits on both.

    Attributes:
        request_id: the id, which is also sent.
        status: the status that was sent; 499 if none was.
    """

    def __init__(self, receive: Receive, send: Send, most: int, stall: float, request_id: str) -> None:
        self._receive, self._send, self._most, self._stall = receive, send, most, stall
        self.request_id, self.status = request_id, _GONE
        self._taken = 0
        self._whole = self._begun = self._stopped = False
        self._until: float | None = None  # when the body must have arrived

    async def receive(self) -> Message:
        """Return the next message; refuse a body that is too large, or does not arrive."""
        if self._whole:
            return await self._receive()
        now = time.monotonic()
        self._until = self._until or now + self._stall
        try:
            async with asyncio.timeout(self._until - now):
                message = await self._receive()
        except TimeoutError:
            await self._stop(body_not_whole(self._stall))
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._taken > self._most:
                await self._stop(body_too_large(self._most))
        else:
            self._whole = True
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the application. A client that takes nothing for too long is given up."""
        if self._stopped:
            return  # the application answers a request that has been refused
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.request_id.encode())]}
        try:
            async with asyncio.timeout(self._stall):
                await self._send(message)
        except TimeoutError:
            self._stopped, self.status = True, _GONE
            raise _StoppedError from None

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal."""
        await self._answer(refusal.status, refusal_body(refusal))

    async def fail(self) -> None:
        """Answer that the server failed, if nothing was sent before."""
        if self._begun or self._stopped:
            self.status = 500
            return
        status, body = failure_body()
        await self._answer(status, body)

    async def _stop(self, refusal: Refusal) -> None:
        if not self._begun:
            await self.refuse(refusal)
        self._stopped = True
        raise _StoppedError

    async def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status == 429:
            headers.append((b"retry-after", b"1"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


class _StoppedError(Exception):
    """The request was given up; what the application still sends goes nowhere."""


def body_not_whole(stall: float) -> Refusal:
    """Return the refusal of a body that does not arrive."""
    wanted = f"a whole body within {stall:g} seconds"
    return Refusal(408, "the body did not arrive", field="body", got="a part of it", wanted=wanted)


def body_too_large(most: int) -> Refusal:
    """Return the refusal of a body of more than `most` bytes."""
    return Refusal(
        413,
        "the body is too large",
        field="body",
        got=f"more than {most} bytes",
        wanted=f"at most {most} bytes",
        fix="shorten it, or start the server with a larger --max-body",
    )


def _names(settings: ServerSettings) -> frozenset[str] | None:
    """Return the names by which the server may be called, so that no page of another site reaches it by its own name.

    None allows every name: other machines reach the server, and it has a key.
    """
    if not is_loopback(settings.host) and not settings.host_names:
        return None
    own = ("localhost", "127.0.0.1", "::1", settings.host)
    return frozenset(name.lower() for name in (*own, *settings.host_names))


def _host(header: str) -> str:
    """Return the name of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Return the id that the client gave, if it is harmless, or a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    harmless = 0 < len(given) <= 64 and given.isascii() and given.replace("-", "").isalnum()
    return given if harmless else uuid.uuid4().hex


def _log(scope: Scope, status: int, seconds: float) -> None:
    state = scope["state"]
    entry: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(1000 * seconds, 1),
    }
    if "label" in state:
        entry["patch"] = state["label"]
        entry["prompt_tokens"] = sum(ticket.completion.prompt_tokens for ticket in state["tickets"])
        entry["completion_tokens"] = sum(len(ticket.completion.token_ids) for ticket in state["tickets"])
    log.info("request", extra={"fields": entry})

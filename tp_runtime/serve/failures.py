"""Errors in the form of OpenAI's API, with this project's field, got, wanted and fix."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import BusyError, PatchInUseError, PatchTargetError, TPError, printable, shown
from .patches import UnknownModelError
from .worker import DrainingError, QueueFullError, TimedOutError

log = logging.getLogger("tp_runtime.serve")

_RETRY_SECONDS = 1

# The status and OpenAI's type of each kind of error; the first that fits counts.
_KINDS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownModelError, 404, "invalid_request_error"),
    (QueueFullError, 429, "rate_limit_error"),
    (DrainingError, 503, "server_error"),
    (TimedOutError, 504, "timeout_error"),
    (PatchInUseError, 409, "invalid_request_error"),
    (PatchTargetError, 400, "invalid_request_error"),
    (BusyError, 409, "invalid_request_error"),
    (TPError, 400, "invalid_request_error"),
)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for an error. What is no error of the request says nothing of the inside."""
    for kind, status, name in _KINDS:
        if isinstance(error, kind):
            assert isinstance(error, TPError)
            parts = {"got": error.got, "wanted": error.wanted, "fix": error.fix or None}
            return status, _body(
                str(error),
                name,
                error.field or None,
                type(error).__name__,
                **{part: None if value is None else printable(str(value))[:500] for part, value in parts.items()},
            )
    return 500, _body("the server failed; its log says more", "server_error", None, "internal_error")


def install(app: FastAPI) -> None:
    """Make every error of an application a body in OpenAI's form."""

    @app.exception_handler(TPError)
    async def own(_request: Request, error: TPError) -> JSONResponse:
        status, body = error_body(error)
        retry = {"Retry-After": str(_RETRY_SECONDS)} if status in (429, 503) else None
        return JSONResponse(body, status, retry)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        field = ".".join(place) or "body"
        got = None if first["type"] == "missing" else shown(first.get("input"))
        more = {} if got is None else {"got": got[:500]}
        message = f"{field}: {first['msg']}" + ("" if got is None else f"; got {got[:500]}")
        return JSONResponse(_body(message, "invalid_request_error", field, "invalid_field", **more), 400)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        headers = None if error.headers is None else dict(error.headers)
        return JSONResponse(_body(str(error.detail), kind, None, None), error.status_code, headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("the request %s failed", request.url.path, exc_info=error)
        status, body = error_body(error)
        return JSONResponse(body, status)


def _body(message: str, kind: str, param: str | None, code: str | None, **more: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}

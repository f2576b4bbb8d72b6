"""Errors in the form of OpenAI's API, with this project's field, got, wanted and fix."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ..errors import BusyError, PatchInUseError, PatchTargetError, TPError, printable, shown
from .patches import UnknownModelError
from .ticket import DrainingError, QueueFullError, TimedOutError

RETRY_SECONDS = 1
_LONGEST = 500  # characters of each part

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
_MEANINGS = {
    400: "The request is not valid.",
    401: "The API key is missing or wrong.",
    403: "The server was not started with this function.",
    404: "There is nothing of that name.",
    405: "The route has no such method.",
    408: "The body did not arrive in time.",
    409: "The patch is in use, or its name is taken.",
    413: "The body is too large.",
    421: "The server is not called by this name.",
    429: "The queue is full; the header Retry-After says when to try again.",
    503: "The server is shutting down.",
    504: "The request took longer than the server allows.",
}
# Options of a request to the model that have another name in a body.
_FIELDS = {
    "json_schema": "response_format.json_schema.schema",
    "template_args": "chat_template_kwargs",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ErrorPart(BaseModel):
    """An error: OpenAI's four fields, and this project's."""

    message: str = Field(description="everything below in one text")
    type: str
    param: str | None = Field(description="the field at fault")
    code: str | None = Field(description="the kind of error")
    field: str | None = Field(None, description="the field at fault")
    got: str | None = Field(None, description="the value found there")
    wanted: str | None = Field(None, description="the values that would have been accepted")
    fix: str | None = Field(None, description="what to do")


class ErrorBody(BaseModel):
    """The body of every answer whose status is 400 or more."""

    error: ErrorPart


class Refusal(NamedTuple):
    """An error that has no exception: its status, and the parts of its body."""

    status: int
    problem: str
    field: str | None = None
    got: str | None = None
    wanted: str | None = None
    fix: str | None = None


class DisabledError(TPError):
    """The server was not started with what the request needs."""


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says about these statuses, and about those that every route has."""
    every = sorted({*statuses, 401, 421, 429})
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in every}


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for an error. What is no error of the request says nothing of the inside."""
    if isinstance(error, DisabledError):
        return 403, _own(error, "invalid_request_error")
    for kind, status, name in _KINDS:
        if isinstance(error, kind):
            assert isinstance(error, TPError)
            return status, _own(error, name)
    return failure_body()


def failure_body() -> tuple[int, dict[str, Any]]:
    """Return the status and the body for a failure of the server."""
    return 500, _body("the server failed; its log says more", "server_error", None, "internal_error")


def refusal_body(refusal: Refusal) -> dict[str, Any]:
    """Return the body for a refusal."""
    status, problem, field, got, wanted, fix = refusal
    text = TPError(problem, field=field or "", got=got, wanted=wanted, fix=fix or "")
    kind = _TYPES.get(status, "invalid_request_error")
    return _body(str(text), kind, field, f"http_{status}", got=got, wanted=wanted, fix=fix)


def install(app: FastAPI) -> None:
    """Make every error of an application a body in OpenAI's form."""

    @app.exception_handler(TPError)
    async def own(_request: Request, error: TPError) -> JSONResponse:
        status, body = error_body(error)
        retry = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
        return JSONResponse(body, status, retry)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(refusal_body(_invalid(list(error.errors()))), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = None if error.headers is None else dict(error.headers)
        body = refusal_body(_refused(request, error))
        return JSONResponse(body, error.status_code, headers)


def _refused(request: Request, error: HTTPException) -> Refusal:
    status, path = error.status_code, printable(request.url.path)
    if status == 404:
        return Refusal(404, "there is no such route", "path", path, "a route that /docs lists", "see /docs")
    if status == 405:
        wanted = (error.headers or {}).get("Allow") or "another method"
        return Refusal(405, "the route has no such method", "method", request.method, wanted, "see /docs")
    return Refusal(status, str(error.detail), "body", "a body that cannot be read", "JSON")


def _invalid(errors: list[dict[str, Any]]) -> Refusal:
    """Return the refusal for the first field that is not valid.

    A field that may have several types has an error for each, whose places continue with the names of the types. What
    their places share is the field.
    """
    place = _place(errors[0])
    same = [error for error in errors if _place(error)[:1] == place[:1]] or errors[:1]
    for error in same[1:]:
        shared = zip(place, _place(error), strict=False)
        place = place[: next((at for at, (mine, other) in enumerate(shared) if mine != other), len(place))]
    first = errors[0]
    if len(same) > 1 and not place:
        same, place = errors[:1], _place(errors[0])
    field = printable(".".join(place))[:_LONGEST] or "body"
    got = "nothing" if first["type"] == "missing" else shown(first.get("input"))
    if first["type"] == "extra_forbidden":
        return Refusal(400, "the field is unknown", field, got, "the fields that /docs lists", "leave it out")
    if first["type"] == "json_invalid":
        why = printable(str(first.get("ctx", {}).get("error", "")))
        return Refusal(400, "the body is not JSON", "body", why, "a JSON object", "send one JSON object")
    if isinstance(first.get("input"), bytes):  # FastAPI reads a body as JSON only if it says so
        fix = "send the header Content-Type: application/json"
        return Refusal(400, "the body is not sent as JSON", "content-type", None, "application/json", fix)
    wanted = " or ".join(dict.fromkeys(_wanted(error["msg"]) for error in same))
    return Refusal(400, "the value is not valid", field, got, printable(wanted)[:_LONGEST], "see /docs")


def _place(error: dict[str, Any]) -> list[str]:
    return [str(part) for part in error["loc"] if part not in ("body", "path", "query")]


def _wanted(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _own(error: TPError, kind: str) -> dict[str, Any]:
    field = error.field
    for name, body in _FIELDS.items():
        if field == name or field.startswith((f"{name}.", f"{name}[")):
            field = body + field.removeprefix(name)
    parts = {"got": error.got, "wanted": error.wanted, "fix": error.fix or None}
    shortened = {part: None if value is None else printable(str(value))[:_LONGEST] for part, value in parts.items()}
    text = TPError(error.problem, field=field, got=error.got, wanted=error.wanted, fix=error.fix)
    return _body(str(text), kind, printable(field)[:_LONGEST] or None, type(error).__name__, **shortened)


def _body(message: str, kind: str, param: str | None, code: str | None, **more: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code, "field": param, **more}}

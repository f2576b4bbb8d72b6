"""What the ingress and the replicas send each other: a request as a whole, and a response piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BODY_METHODS = ("POST",)
_COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
_LONGEST_NAME = 200  # characters; Ray keeps the names that it chose replicas by


@dataclass(frozen=True)
class Call:
    """An HTTP request.

    Attributes:
        method: the method.
        path: the path, without the query.
        query: the query, as it was sent.
        headers: the headers, lower case.
        body: the body.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def named(self) -> tuple[str, str | Mapping[str, Any] | None] | None:
        """Return the fields `model` and `patch` of the body; None if the request names no model.

        What the fields hold is checked by the application; this only says which replica suits the request.
        """
        if self.method not in _BODY_METHODS:
            return None
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            return None
        patch = body.get("patch")
        return body["model"], patch if isinstance(patch, str | dict) else None

    def affinity(self) -> str:
        """Return the name of the patch by which Ray chooses a replica; empty if every replica suits.

        A sum goes where the first of its patches is.
        """
        found = self.named()
        if found is None or self.path not in _COMPLETIONS:
            return ""
        model, patch = found
        first = next(iter(patch), "") if isinstance(patch, Mapping) else (patch or model).split("+")[0]
        name = str(first).partition("@")[0]
        return name if len(name) <= _LONGEST_NAME else ""


@dataclass(frozen=True)
class Head:
    """The beginning of a response.

    Attributes:
        status: the status.
        headers: the headers, lower case.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

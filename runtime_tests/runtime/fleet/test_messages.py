"""What the ingress reads from a request, to choose a replica."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("ray")
Call = pytest.importorskip("tp_runtime.fleet.messages").Call


def call(body: Any, method: str = "POST") -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Call(method, "/v1/chat/completions", b"", (), raw)


@pytest.mark.parametrize(
    ("body", "affinity"),
    [
        ({"model": "pirate"}, "pirate"),
        ({"model": "pirate@0.5+french"}, "pirate"),
        ({"model": "base", "patch": "french@2"}, "french"),
        ({"model": "base", "patch": {"french": 0.5, "pirate": 1}}, "french"),
        ({"model": "base", "patch": {}}, ""),
        ({"model": "base", "patch": None}, "base"),
        ({"model": 3}, ""),
        ({"messages": []}, ""),
        ([1], ""),
        (b"{", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_a_request_goes_where_the_first_of_its_patches_is(body: Any, affinity: str) -> None:
    assert call(body).affinity() == affinity


def test_a_request_without_a_body_suits_every_replica() -> None:
    assert call(b"", "GET").affinity() == ""

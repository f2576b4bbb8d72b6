"""Every error of the server has OpenAI's form, with the field, what was got, what was wanted and what to do."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from runtime_tests.patches import patch_for
from runtime_tests.runtime.pace import Pace
from tp_runtime.model import PatchedModel
from tp_runtime.patch import ENTRIES_STAND, KV_PARTS, KVPrefix, Patch
from tp_runtime.serve import ServerSettings
from tp_runtime.serve.failures import ErrorBody

from .conftest import CHAT, ask, client, running

LONG = {**CHAT, "max_tokens": 400, "min_tokens": 400}


def error_of(response: httpx.Response, status: int, field: str | None) -> dict[str, Any]:
    """Check the form of an error, and return it."""
    assert response.status_code == status, response.text
    ErrorBody.model_validate(response.json())
    error = response.json()["error"]
    assert error["param"] == error["field"] == field
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": "x"}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"patch": 3}, "patch"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"temperature": 101}, "temperature"),
        ({"max_tokens": 2000}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"model": "pirate@much"}, "model"),
        ({"model": "pirate", "patch": "french"}, "patch"),
        ({"model": "pirate@nan"}, "strength"),
        ({"model": "+".join(["pirate"] * 9)}, "model"),
        ({"n": 65}, "n"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_400_names_the_field(model: PatchedModel, change: dict[str, Any], field: str) -> None:
    error = error_of(ask(model, "POST", "/v1/chat/completions", json={**CHAT, **change}), 400, field)
    assert error["type"] == "invalid_request_error" and error["got"] is not None and error["wanted"] is not None


def test_400_answers_a_body_that_is_not_json(model: PatchedModel) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"{", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}", b"\xff"):
        error_of(ask(model, "POST", "/v1/chat/completions", content=body, headers=headers), 400, "body")
    form = ask(model, "POST", "/v1/chat/completions", content=json.dumps(CHAT))
    assert "Content-Type: application/json" in error_of(form, 400, "content-type")["fix"]


@pytest.mark.parametrize("field", ["content", "tools", "schema", "kwargs"])
def test_400_answers_values_that_are_nested_too_deep(model: PatchedModel, field: str) -> None:
    deep = "[" * 900 + "]" * 900
    bodies = {
        "content": '"messages": [{"role": "user", "content": DEEP}]',
        "tools": '"messages": [{"role": "user", "content": "x"}], "tools": DEEP',
        "schema": '"messages": [{"role": "user", "content": "x"}], "response_format": '
        '{"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": DEEP}}}',
        "kwargs": '"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": DEEP}',
    }
    body = '{"model": "tiny-llama", "max_tokens": 2, ' + bodies[field].replace("DEEP", deep) + "}"
    response = ask(model, "POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and len(response.content) < 10_000
    ErrorBody.model_validate(response.json())


def test_400_says_what_a_patch_cannot_in_the_patchs_own_words(model: PatchedModel) -> None:
    folder = model.graph.folder
    kv = folder.kv
    rng = np.random.default_rng(0)
    entries = {
        (layer, part): rng.standard_normal((2, kv.heads, kv.head_dim)).astype(np.float32)
        for layer in range(folder.layers)
        for part in KV_PARTS
    }
    start = tuple(model.codec.render("Hi")[:2])
    made = Patch({}, patch_for(folder, 3).config, KVPrefix(entries, start, 4))
    model.load_patch(made, "policy")
    model.load_patch(made, "policy2")
    try:
        words = made.capabilities
        half = ask(model, "POST", "/v1/chat/completions", json={**CHAT, "model": "policy@0.5"})
        assert half.status_code == 400 and words.strength in half.json()["error"]["wanted"]
        both = ask(model, "POST", "/v1/chat/completions", json={**CHAT, "model": "policy+policy2"})
        assert both.status_code == 400 and "entries" in both.text
        system = [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        for change in ({"messages": system}, {"tools": [tool]}):
            refused = ask(model, "POST", "/v1/chat/completions", json={**CHAT, "model": "policy", **change})
            assert refused.status_code == 400 and ENTRIES_STAND in refused.json()["error"]["message"]
    finally:
        model.unload_patch("policy")
        model.unload_patch("policy2")


def test_401_asks_for_a_key(model: PatchedModel) -> None:
    settings = {"api_keys": ("correct-horse", "battery-staple")}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct-horse"}):
        response = ask(model, "GET", "/v1/models", headers=headers, settings=settings)
        assert error_of(response, 401, "authorization")["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer" and "correct-horse" not in response.text
    good = {"authorization": "Bearer battery-staple"}
    assert ask(model, "GET", "/v1/models", headers=good, settings=settings).status_code == 200
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert ask(model, "GET", path, settings=settings).status_code == 200
    for path in ("/metrics", "/v1/patches", "/static/../v1/models", "//v1/models"):
        assert ask(model, "GET", path, settings=settings).status_code in (401, 404)


def test_403_says_how_patches_are_managed(model: PatchedModel) -> None:
    body = {"name": "x", "file": "x.safetensors"}
    assert "--manage-patches" in error_of(ask(model, "POST", "/v1/patches", json=body), 403, "server")["fix"]
    error_of(ask(model, "DELETE", "/v1/patches/pirate"), 403, "server")
    assert "pirate" in model.patches


def test_404_lists_what_can_be_named(model: PatchedModel) -> None:
    error = error_of(ask(model, "POST", "/v1/chat/completions", json={**CHAT, "model": "nobody"}), 404, "model")
    assert error["wanted"] == "tiny-llama, french, pirate"
    assert error_of(ask(model, "GET", "/v1/nothing"), 404, "path")["got"] == "/v1/nothing"


def test_405_names_the_methods(model: PatchedModel) -> None:
    response = ask(model, "GET", "/v1/completions")
    assert error_of(response, 405, "method")["wanted"] == response.headers["allow"] == "POST"


def test_409_refuses_a_name_that_is_taken_and_a_patch_in_use(model: PatchedModel, tmp_path: Path, pace: Pace) -> None:
    pace.allow(0)
    patch_for(model.graph.folder, 7).save(tmp_path / "file.safetensors")
    settings = {"patch_dir": tmp_path, "manage_patches": True}

    async def both() -> None:
        async with client(model, **settings) as made:
            taken = await made.post("/v1/patches", json={"name": "pirate", "file": "file.safetensors"})
            error_of(taken, 409, "name")
            body = {**CHAT, "min_tokens": 4, "model": "pirate"}
            answer = asyncio.create_task(made.post("/v1/chat/completions", json=body))
            worker = made.app.state.worker  # type: ignore[attr-defined]
            while not worker.running:
                await asyncio.sleep(0)
            used = await made.delete("/v1/patches/pirate")
            assert error_of(used, 409, used.json()["error"]["field"])
            pace.allow(None)
            assert (await answer).status_code == 200

    asyncio.run(both())
    model.unload_patch("file")


def test_413_refuses_large_bodies_also_in_chunks(model: PatchedModel) -> None:
    body = json.dumps({**CHAT, "user": "x" * 5000}).encode()
    headers = {"content-type": "application/json"}

    async def chunks() -> Any:
        for at in range(0, len(body), 100):
            yield body[at : at + 100]

    for content in (body, chunks()):
        response = ask(
            model, "POST", "/v1/chat/completions", content=content, headers=headers, settings={"body_bytes": 1000}
        )
        assert error_of(response, 413, "body")["wanted"] == "at most 1000 bytes"
    with running(model, ServerSettings(port=0, body_bytes=1000)) as server, server.http() as http:
        one = http.post("/v1/chat/completions", content=iter([body[:900], body[900:]]), headers=headers)
        assert error_of(one, 413, "body")


def test_408_gives_up_a_body_that_does_not_arrive(model: PatchedModel) -> None:
    async def never() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    headers = {"content-type": "application/json"}
    response = ask(model, "POST", "/v1/chat/completions", content=never(), headers=headers, settings={"stall": 0.05})
    error_of(response, 408, "body")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil:80", "[::2]"])
def test_421_refuses_names_of_other_sites(model: PatchedModel, host: str) -> None:
    error_of(ask(model, "GET", "/v1/models", headers={"host": host}), 421, "host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "my.example"])
def test_the_servers_own_names_are_served(model: PatchedModel, host: str) -> None:
    response = ask(model, "GET", "/v1/models", headers={"host": host}, settings={"host_names": ("my.example",)})
    assert response.status_code == 200


def test_429_refuses_all_or_no_answers_of_a_request(model: PatchedModel) -> None:
    async def full() -> None:
        async with client(model, rows=1, queue=2) as made:
            worker = made.app.state.worker  # type: ignore[attr-defined]
            never = error_of(await made.post("/v1/chat/completions", json={**CHAT, "n": 4}), 400, "n")
            assert "3" in never["wanted"]
            reserved = worker.reserve(2)
            assert reserved
            response = await made.post("/v1/chat/completions", json={**CHAT, "n": 2})
            assert error_of(response, 429, "server")["type"] == "rate_limit_error"
            assert response.headers["retry-after"] == "1" and worker.running + worker.waiting == 1 + 0
            assert (await made.post("/v1/chat/completions", json=CHAT)).status_code == 200
            worker.release(2)
            assert (await made.post("/v1/chat/completions", json={**CHAT, "n": 3})).status_code == 200

    asyncio.run(full())


def test_a_request_that_is_refused_leaves_no_place_taken(model: PatchedModel) -> None:
    async def several() -> None:
        async with client(model, rows=1, queue=1) as made:
            for _ in range(5):
                for change in ({"model": "nobody"}, {"messages": [{"role": 1}]}, {"model": "pirate@nan"}):
                    body = {**CHAT, **change}
                    assert (await made.post("/v1/chat/completions", json=body)).status_code in (400, 404)
                two = ["fine", "\ud800"]
                body = json.dumps({"model": "tiny-llama", "prompt": two, "max_tokens": 300})
                refused = await made.post("/v1/completions", content=body, headers={"content-type": "application/json"})
                assert refused.status_code == 400
            assert (await made.post("/v1/chat/completions", json={**CHAT, "n": 2})).status_code == 200

    asyncio.run(several())


def test_503_answers_while_the_server_drains(model: PatchedModel) -> None:
    async def draining() -> None:
        async with client(model) as made:
            assert (await made.get("/ready")).status_code == 200
            made.app.state.worker.refuse()  # type: ignore[attr-defined]
            response = await made.post("/v1/chat/completions", json=CHAT)
            error_of(response, 503, "server")
            assert response.headers["retry-after"] == "1"
            assert (await made.get("/ready")).status_code == 503
            assert (await made.get("/health")).status_code == 200

    asyncio.run(draining())


@pytest.mark.usefixtures("slow")
def test_504_ends_a_request_that_takes_too_long(model: PatchedModel) -> None:
    response = ask(model, "POST", "/v1/chat/completions", json=LONG, settings={"timeout": 0.05})
    assert error_of(response, 504, "server")["type"] == "timeout_error"
    stream = ask(model, "POST", "/v1/chat/completions", json={**LONG, "stream": True}, settings={"timeout": 0.05})
    if stream.status_code == 200:  # the time was over only after the answer had begun
        last = stream.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["type"] == "timeout_error"
    else:
        error_of(stream, 504, "server")


def test_500_says_nothing_of_the_inside(
    model: PatchedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any) -> Any:
        raise ValueError("a secret")

    monkeypatch.setattr("tp_runtime.serve.app.model_card", broken)
    response = ask(model, "GET", "/v1/models")
    assert error_of(response, 500, None)["type"] == "server_error"
    assert "secret" not in response.text and "secret" in caplog.text


def test_errors_hold_no_character_that_cannot_be_sent(model: PatchedModel) -> None:
    headers = {"content-type": "application/json"}
    bodies = [
        r'{"model": "\ud800", "messages": [{"role": "user", "content": "x"}]}',
        r'{"model": "tiny-llama", "messages": [{"role": "user", "content": "\ud800"}]}',
        r'{"model": "tiny-llama", "messages": [{"role": "user", "content": "x"}], "\ud800": 1}',
        r'{"model": "tiny-llama", "messages": [{"role": "user", "content": "x", "\ud800": 1}]}',
        r'{"model": "tiny-llama", "messages": [{"role": "user", "content": "x"}], "stop": ["\ud800"], "max_tokens": 2}',
        r'{"model": "tiny-llama", "messages": [{"role": "user", "content": "x"}], "patch": {"\ud800": 1}}',
    ]
    for body in bodies:
        response = ask(model, "POST", "/v1/chat/completions", content=body, headers=headers)
        assert response.status_code in (200, 400, 404), body


def test_no_two_requests_share_an_id(model: PatchedModel) -> None:
    first, second = (ask(model, "GET", "/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    given = ask(model, "GET", "/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    harmful = ask(model, "GET", "/health", headers={"x-request-id": 'a"b c'})
    assert harmful.headers["x-request-id"] != 'a"b c'


def test_open_requests_are_bounded(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_runtime.serve.guard._SPARE_REQUESTS", -1)
    held = threading.Event()

    async def many() -> None:
        async with client(model, rows=1, queue=1) as made:

            async def slow() -> Any:
                yield b"{"
                while not held.is_set():
                    await asyncio.sleep(0.001)

            waiting = asyncio.create_task(
                made.post("/v1/completions", content=slow(), headers={"content-type": "application/json"})
            )
            response = await made.get("/v1/models")
            while response.status_code != 429:
                await asyncio.sleep(0.001)
                response = await made.get("/v1/models")
            assert response.headers["retry-after"] == "1"
            error_of(response, 429, "server")
            assert (await made.get("/health")).status_code == 200
            held.set()
            assert (await waiting).status_code == 400

    asyncio.run(many())

"""What a server says of itself: health, metrics, logs, documentation; and what browsers of other sites get."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tp_runtime.errors import RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.serve import ServerSettings, log_as_json

from .conftest import CHAT, ask, client


def test_metrics_count_what_was_answered(model: PatchedModel) -> None:
    async def read() -> dict[tuple[str, tuple[str, ...]], float]:
        async with client(model) as made:
            for name in ("pirate", "pirate@0.5", "tiny-llama", "pirate+french"):
                body = {**CHAT, "model": name, "min_tokens": 4}
                assert (await made.post("/v1/chat/completions", json=body)).status_code == 200
            await made.post("/v1/chat/completions", json={**CHAT, "model": "nobody"})
            text = (await made.get("/metrics")).text
            found = text_string_to_metric_families(text)
            return {(s.name, tuple(s.labels.values())): s.value for family in found for s in family.samples}

    values = asyncio.run(read())
    assert values["tp_requests_total", ("pirate", "length")] == 2  # strengths have no label of their own
    assert values["tp_requests_total", ("pirate+french", "length")] == 1
    assert values["tp_completion_tokens_total", ("pirate",)] == 8
    assert values["tp_first_token_seconds_count", ("tiny-llama",)] == 1
    assert values["tp_token_seconds_count", ("tiny-llama",)] == 1
    assert values["tp_patch_switches_total", ()] == 3
    assert values["tp_http_answers_total", ("200",)] == 4 and values["tp_http_answers_total", ("404",)] == 1
    assert values["tp_rows", ()] == values["tp_queue", ()] == 0 and values["tp_patches", ()] == 2
    assert values["tp_prefix_cache_misses", ()] > 0 and values["tp_device_info", ("cpu",)] == 1


def test_the_labels_of_metrics_are_bounded(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_runtime.serve.metrics._MOST_LABELS", 1)

    async def read() -> str:
        async with client(model) as made:
            for name in ("pirate", "french", "tiny-llama"):
                await made.post("/v1/chat/completions", json={**CHAT, "model": name})
            return (await made.get("/metrics")).text

    assert set(re.findall(r'tp_prompt_tokens_total\{patch="([^"]*)"', asyncio.run(read()))) == {"pirate", "other"}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What log_as_json writes; the loggers are as before afterwards."""
    loggers = [logging.getLogger(name) for name in ("tp_runtime", "uvicorn")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    stream = io.StringIO()
    log_as_json(stream)
    yield stream
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_each_request_is_a_line_of_json_with_its_id(model: PatchedModel, lines: io.StringIO) -> None:
    headers = {"x-request-id": "mine"}
    ask(model, "POST", "/v1/chat/completions", json={**CHAT, "model": "pirate", "min_tokens": 4}, headers=headers)
    entry: dict[str, Any] = next(
        found for found in map(json.loads, lines.getvalue().splitlines()) if found["message"] == "request"
    )
    assert entry["request"] == "mine" and entry["status"] == 200 and entry["patch"] == "pirate"
    assert entry["completion_tokens"] == 4 and entry["prompt_tokens"] > 0 and entry["ms"] > 0
    assert entry["path"] == "/v1/chat/completions" and entry["level"] == "info" and entry["time"].endswith("Z")


def test_a_failure_is_logged_with_the_id_of_its_request(
    model: PatchedModel, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any) -> Any:
        raise ValueError("two\nlines")

    monkeypatch.setattr("tp_runtime.serve.app.model_card", broken)
    ask(model, "GET", "/v1/models", headers={"x-request-id": "mine"})
    entries = [json.loads(line) for line in lines.getvalue().splitlines()]
    failed = next(entry for entry in entries if entry["level"] == "error")
    assert failed["request"] == "mine" and "two\nlines" in failed["traceback"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documentation_works_offline(model: PatchedModel, path: str) -> None:
    async def read() -> None:
        async with client(model) as made:
            page = (await made.get(path)).text
            sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
            assert sources and not [source for source in sources if source.startswith(("http", "//"))]
            assert "http://" not in page and "https://" not in page
            for source in sources:
                assert (await made.get(source)).status_code == 200, source

    asyncio.run(read())


def test_the_openapi_document_says_what_errors_look_like(model: PatchedModel) -> None:
    document = ask(model, "GET", "/openapi.json", settings={"api_keys": ("a-long-key",)}).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "408", "413", "421", "429", "503", "504"} == set(chat["responses"])
    assert chat["responses"]["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert chat["security"] == [{"key": []}]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_pages_of_other_sites_get_nothing_by_default(model: PatchedModel) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert ask(model, "OPTIONS", "/v1/chat/completions", headers=headers).status_code == 405
    response = ask(model, "GET", "/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_pages_of_an_allowed_site_may_ask_without_a_key_first(model: PatchedModel) -> None:
    settings = {"origins": ("https://good.example",), "api_keys": ("a-long-key",)}
    headers = {"origin": "https://good.example", "access-control-request-method": "POST"}
    first = ask(model, "OPTIONS", "/v1/chat/completions", headers=headers, settings=settings)
    assert first.status_code == 200 and first.headers["access-control-allow-origin"] == "https://good.example"
    refused = ask(model, "GET", "/v1/models", headers={"origin": "https://good.example"}, settings=settings)
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    evil = {**headers, "origin": "https://evil.example"}
    assert ask(model, "OPTIONS", "/v1/chat/completions", headers=evil, settings=settings).status_code == 400


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"host": "0.0.0.0"}, "host"),
        ({"rows": 0}, "rows"),
        ({"stall": 0}, "stall"),
        ({"timeout": float("inf")}, "timeout"),
        ({"port": 70000}, "port"),
        ({"api_keys": ("short",)}, "api_key"),
        ({"manage_patches": True}, "manage_patches"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        ServerSettings(**settings)
    assert error.value.field == field and "short" not in str(error.value)

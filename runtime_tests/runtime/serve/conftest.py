"""Fixtures: an open tiny model with two patches, and servers for it, in this process or on a port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from runtime_tests.patches import patch_for
from runtime_tests.runtime.pace import Pace, set_pace
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.serve import Server, ServerSettings, create_app, new_server
from tp_runtime.text import TextBatch

CHAT = {"model": "tiny-llama", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
SECONDS = 60.0  # no test depends on this; it ends one that would wait for ever


@pytest.fixture(scope="module")
def model(tiny_llama_export: Path) -> PatchedModel:
    """A model of this module's own, with the patches `pirate` and `french`."""
    made = PatchedModel.from_pretrained(tiny_llama_export, "cpu", threads=1, prefix_cache_bytes=2**20)
    for seed, name in enumerate(("pirate", "french")):
        made.load_patch(patch_for(made.graph.folder, seed, scale=0.5), name)
    return made


@pytest.fixture
def stopping(model: PatchedModel) -> Iterator[Patch]:
    """A loaded patch `stopping` whose answers end before a character that the model's answer has."""
    from dataclasses import replace

    pirate = model.patches["pirate"]
    text = model.generate("How do I learn to swim?", patch="pirate", max_new_tokens=12, temperature=1.0, seed=5)
    patch = Patch(pirate.deltas, replace(pirate.config, name="stopping", stop=(text[3],)))
    model.load_patch(patch, "stopping")
    yield patch
    model.unload_patch("stopping")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step of a batch take so long that an answer of many tokens still runs when the test acts on it."""
    step = TextBatch.step

    def slowly(self: TextBatch) -> Any:
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(TextBatch, "step", slowly)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    """The pace of every batch of a test."""
    return set_pace(monkeypatch)


class Running:
    """A server that listens on a port, in a thread."""

    def __init__(self, app: FastAPI, server: Server, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.app, self.server, self.url, self.loop = app, server, url, loop
        self.worker = app.state.worker

    def openai(self, **options: Any) -> openai.OpenAI:
        """Return the official client."""
        settings: dict[str, Any] = {"api_key": "any-key-at-all", "max_retries": 0, "timeout": SECONDS, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def http(self, **options: Any) -> httpx.Client:
        """Return a plain client."""
        return httpx.Client(base_url=self.url, timeout=SECONDS, **options)

    def wait(self, found: Callable[[], object]) -> None:
        """Wait until something is so."""
        wait_until(found)

    def leave(self) -> None:
        """Do what SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.leave)


def wait_until(found: Callable[[], object]) -> None:
    """Wait until something is so."""
    done = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if found():
            return
        done.wait(0.01)
    raise AssertionError("this never came to be")


@contextmanager
def running(model: PatchedModel, settings: ServerSettings) -> Iterator[Running]:
    """Run a server on a free port, in a thread."""
    app = create_app(model, settings)
    ports: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    def started(_host: str, port: int) -> None:
        loops.append(asyncio.get_running_loop())
        ports.append(port)

    server = new_server(app, settings, started)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: ports or not thread.is_alive())
        yield Running(app, server, f"http://127.0.0.1:{ports[0]}", loops[0])
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(model: PatchedModel) -> Iterator[Running]:
    """A server on a port, with the default settings."""
    with running(model, ServerSettings(port=0)) as server:
        yield server


Client = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def client(model: PatchedModel, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an application in this process."""
    app = create_app(model, ServerSettings(**settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=SECONDS) as made:
            made.app = app  # type: ignore[attr-defined]
            yield made


def ask(model: PatchedModel, method: str, path: str, *, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Send one request to a server in this process, and return the response."""

    async def send() -> httpx.Response:
        async with client(model, **(settings or {})) as made:
            return await made.request(method, path, **options)

    return asyncio.run(send())

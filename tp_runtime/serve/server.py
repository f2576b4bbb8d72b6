"""The process around the application: it listens, and drains when it is asked to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .settings import ServerSettings

_LAST_SECONDS = 5  # for what has been answered and not sent when all requests have ended


class Server(uvicorn.Server):
    """A uvicorn server that goes on listening while it drains, so that new requests get an answer, which is 503.

    uvicorn itself closes its sockets at the first signal. A second signal ends the server without waiting.

    Args:
        config: uvicorn's configuration.
        drain: refuses new requests, and waits for those that run.
        started: called with the address and the port, once the server listens.
    """

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[], Awaitable[object]], started: Callable[[str, int], object]
    ) -> None:
        super().__init__(config)
        self._drain, self._started_at = drain, started
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.servers and not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._started_at(host, port)

    def leave(self) -> None:
        """Drain, and then end. This is called in the event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._leave())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second. The signal is not raised again: the end is orderly."""
        if self._draining is None and self._loop is not None:
            self._loop.call_soon_threadsafe(self.leave)
        else:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    async def _leave(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


def new_server(app: FastAPI, settings: ServerSettings, started: Callable[[str, int], object]) -> Server:
    """Return a server for an application of `create_app`; its `run` returns when a signal has ended it.

    Args:
        app: the application.
        settings: the settings that it was made with.
        started: called with the address and the port, once the server listens.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_LAST_SECONDS,
        lifespan="on",
    )
    worker = app.state.worker
    return Server(config, lambda: asyncio.to_thread(worker.drain, settings.drain), started)

"""A server in a thread, which tests can cut off, end and start again."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import uvicorn

from tp_runtime.model import PatchedModel
from tp_runtime.serve import ServerSettings, create_app

_PATIENCE = 60.0  # seconds after which a test fails that waits for the server


class Served:
    """A server of a model on a port of its own.

    Args:
        model: the open model.
        settings: further settings of the server.
    """

    def __init__(self, model: PatchedModel, **settings: Any) -> None:
        self.model, self._settings = model, settings
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start the server, again after `stop`, and wait until it answers."""
        app = create_app(self.model, ServerSettings(port=self.port, drain=1, **self._settings))
        config = uvicorn.Config(app, port=self.port, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + _PATIENCE
        while not self._server.started:
            assert time.monotonic() < end and self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    def cut(self) -> None:
        """Break all connections off, as a network does."""
        for connection in list(self._server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    def stop(self) -> None:
        """End the server; what still runs is stopped."""
        self.cut()
        self._server.should_exit = True
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive()

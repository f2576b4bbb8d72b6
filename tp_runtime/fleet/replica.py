"""A replica: the open model behind the application of the server, called without a socket."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve

from ..errors import TPError
from ..model import PatchedModel
from ..serve import ServerSettings, create_app
from .catalogue import Catalogue
from .messages import Call, Head


class _Held:
    """A patch that this replica holds, for as long as Ray keeps the object."""

    def __init__(self, catalogue: Catalogue, name: str) -> None:
        catalogue.hold(name)
        # Not __del__: Ray calls that itself when it drops the object, also while a request still holds it.
        weakref.finalize(self, catalogue.let_go, name).atexit = False


def replica_class(patches_per_replica: int) -> type:
    """Return the class of replicas.

    Args:
        patches_per_replica: the largest number of patches that a replica holds; the least recently used are let go.
    """

    class Replica:
        """One open model.

        Args:
            model_dir: the exported folder.
            patches: the folder of the patch files.
            name: the name of the model in requests; None takes that of its base model.
            settings: what the application accepts.
            options: the arguments of PatchedModel.from_pretrained.
        """

        async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
            self, model_dir: str, patches: str, name: str | None, settings: ServerSettings, options: dict[str, Any]
        ) -> None:
            model = await asyncio.to_thread(PatchedModel.from_pretrained, model_dir, **options)
            base = name or Path(model.graph.folder.base_model).name
            self._catalogue = Catalogue(model, base, Path(patches))
            self._app = create_app(model, settings, catalogue=(self._catalogue, self._catalogue))
            self._lifespan = self._app.router.lifespan_context(self._app)
            await self._lifespan.__aenter__()

        @serve.multiplexed(max_num_models_per_replica=patches_per_replica)  # type: ignore[untyped-decorator]
        async def held(self, name: str) -> _Held:
            """Load a patch, or keep the one that is loaded."""
            return await asyncio.to_thread(_Held, self._catalogue, name)

        async def call(self, call: Call) -> AsyncIterator[Head | bytes]:
            """Answer a request: first its head, then the pieces of its body."""
            # The patches are held until the end, so that none of them is let go under a request.
            kept = []
            for name in await self._named(call):
                try:
                    kept.append(await self.held(name))
                except (TPError, KeyError):
                    break  # it went away meanwhile; the application says what is wrong
            pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue(maxsize=16)
            running = asyncio.create_task(self._run(call, pieces))
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                await running
            finally:
                running.cancel()
                kept.clear()

        async def check_health(self) -> None:
            """Raise if the replica cannot answer; Ray then replaces it."""
            head = None
            async for piece in self.call(Call("GET", "/ready", b"", ((b"host", b"localhost"),), b"")):
                head = head or piece
            if not isinstance(head, Head) or head.status != 200:
                raise RuntimeError("the replica is not ready")

        async def _named(self, call: Call) -> list[str]:
            """Return the patches of the folder that a request names; what it names wrongly the application refuses."""
            found = call.named()
            if found is None:
                return []
            try:
                names = [name for name, _strength in self._catalogue.parts(*found)]
            except (TPError, TypeError, ValueError, OverflowError):
                return []
            if any(name not in self._catalogue.names() for name in names):
                await asyncio.to_thread(self._catalogue.scan)  # a file that has just been added
            known = self._catalogue.names()
            return [name for name in names if name in known]

        async def _run(self, call: Call, pieces: asyncio.Queue[Head | bytes | None]) -> None:
            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": call.method,
                "scheme": "http",
                "path": call.path,
                "raw_path": call.path.encode(),
                "query_string": call.query,
                "headers": list(call.headers),
                "client": None,
                "server": ("localhost", 80),
                "state": {},
            }
            asked = False

            async def receive() -> dict[str, Any]:
                nonlocal asked
                if asked:
                    await asyncio.Event().wait()  # until the task is cancelled: the client is the ingress's to watch
                asked = True
                return {"type": "http.request", "body": call.body, "more_body": False}

            async def send(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    await pieces.put(Head(message["status"], tuple(map(tuple, message["headers"]))))
                elif message.get("body"):
                    await pieces.put(bytes(message["body"]))

            try:
                await self._app(scope, receive, send)  # type: ignore[arg-type]
            except Exception:
                await pieces.put(None)
                raise
            await pieces.put(None)  # not after a cancellation: then nobody takes the pieces any more

    return Replica

"""The application: the routes, what stands in front of them, and what starts and ends with the server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from ..errors import RequestError
from ..model import PatchedModel
from .cards import model_facts
from .failures import install
from .guard import Guard
from .metrics import Metrics
from .patches import ServedPatches
from .routes import Completions, model_card
from .schema import Json, PatchBody
from .settings import ServerSettings, is_loopback
from .worker import Worker

_PAGE = Path(__file__).parent / "page"
_SCAN_SECONDS = 1.0
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
_LOCAL = frozenset(("localhost", "127.0.0.1", "::1", "testserver"))


def create_app(
    model: PatchedModel, settings: ServerSettings, name: str | None = None, patches: ServedPatches | None = None
) -> FastAPI:
    """Return the ASGI application of a server.

    Args:
        model: the open model, with the patches that are loaded already.
        settings: what the server accepts.
        name: the name of the model in requests; by default the name of its base model.
        patches: what requests can name; by default the loaded patches and those of the settings' folder.

    Raises:
        RequestError: a patch has a name that requests cannot name.
    """
    folder = model.graph.folder
    patches = patches or ServedPatches(model, name or Path(folder.base_model).name, settings.patch_dir)
    patches.scan()
    metrics = Metrics(model.graph.device.kind)
    worker = Worker(model, settings.rows, settings.queue, settings.timeout, metrics.ended)
    metrics.watch(worker, lambda: len(patches.names()), model.prefix_cache)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        watching = asyncio.create_task(_watch(patches))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(worker.drain, settings.drain)

    app = FastAPIOffline(
        title="tp-runtime",
        version=metadata.version("tp-runtime"),
        summary=f"{patches.base} under thought patches",
        lifespan=lifespan,
    )
    install(app)
    app.include_router(Completions(worker, patches, settings, folder.graph_digest[:12]).router())
    facts = model_facts(folder, settings, model.prefix_cache is not None)
    app.include_router(_models(patches, settings, facts))
    app.include_router(_state(worker, metrics))
    app.mount("/static", _Fresh(directory=_PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    hosts = _LOCAL if is_loopback(settings.host) else None
    app.add_middleware(partial(Guard, api_keys=settings.api_keys, hosts=hosts, body_bytes=settings.body_bytes))  # type: ignore[arg-type]
    return app


class _Fresh(StaticFiles):
    """The files of the page, which a browser asks for anew: those of two versions do not work together."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _models(patches: ServedPatches, settings: ServerSettings, facts: Json) -> APIRouter:
    router, started = APIRouter(prefix="/v1"), int(time.time())

    def cards() -> list[Json]:
        own = {**model_card(patches.base, None, started), "model": facts}
        return [own, *(model_card(name, patch, started) for name, patch in sorted(patches.names().items()))]

    @router.get("/models", summary="List what the field model can name")
    async def models() -> Json:
        return {"object": "list", "data": cards()}

    @router.get("/models/{name}", summary="Describe the model or a patch")
    async def one(name: str) -> Json:
        patches.choice(name, None)
        return next((card for card in cards() if card["id"] == name), model_card(name, None, started))

    @router.get("/patches", summary="List the loaded patches")
    async def listed() -> Json:
        return {"object": "list", "data": cards()[1:]}

    def require_managed() -> None:
        if not settings.manage_patches:
            raise RequestError(
                "this server does not load or unload patches on request",
                field="server",
                got="manage_patches: off",
                wanted="manage_patches: on",
                fix="start it with --patch-dir DIR --manage-patches",
            )

    @router.post("/patches", status_code=201, summary="Load a patch file of the server's folder")
    async def load(body: PatchBody) -> Json:
        require_managed()
        await asyncio.to_thread(patches.load, body.name, body.file)
        return model_card(body.name, patches.names()[body.name], started)

    @router.delete("/patches/{name}", status_code=204, summary="Unload a patch")
    async def unload(name: str) -> Response:
        require_managed()
        await asyncio.to_thread(patches.unload, name)
        return Response(status_code=204)

    return router


def _state(worker: Worker, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", summary="Whether the process lives")
    async def health() -> Json:
        return {"status": "ok"}

    @router.get("/ready", summary="Whether requests are accepted")
    async def ready() -> JSONResponse:
        accepting = worker.accepting
        return JSONResponse({"status": "ready" if accepting else "not ready"}, 200 if accepting else 503)

    @router.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    return router


async def _watch(patches: ServedPatches) -> None:
    while True:
        await asyncio.sleep(_SCAN_SECONDS)
        await asyncio.to_thread(patches.scan)

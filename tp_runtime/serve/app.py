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

from ..model import PatchedModel
from .answers import ModelCard, ModelList, State
from .cards import model_card, model_facts
from .failures import DisabledError, documented, install
from .guard import Guard
from .metrics import Metrics
from .patches import ServedPatches
from .routes import Completions
from .schema import Json, PatchBody
from .settings import ServerSettings
from .watch import PatchFolder, Watched, watch
from .worker import Worker

_PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def create_app(
    model: PatchedModel,
    settings: ServerSettings,
    name: str | None = None,
    catalogue: tuple[ServedPatches, Watched] | None = None,
) -> FastAPI:
    """Return the ASGI application of a server.

    Args:
        model: the open model, with the patches that are loaded already.
        settings: what the server accepts.
        name: the name of the model in requests; by default the name of its base model.
        catalogue: what requests can name, and what looks for changes of it; by default the loaded patches, and the
            files of the settings' folder.

    Raises:
        RequestError: the model or a patch has a name that requests cannot name.
        ModelFormatError: tokenizer.json is not the one that was exported.
    """
    folder = model.graph.folder
    model.codec.load_tokenizer()  # a server answers many texts, and none of them is to wait for it
    if catalogue is None:
        served = ServedPatches(model, name or Path(folder.base_model).name, settings.patch_dir)
        catalogue = served, PatchFolder(served)
    patches, watched = catalogue
    watched.scan(settle=False)
    metrics = Metrics(model.graph.device.kind)
    worker = Worker(model, settings.rows, settings.queue, settings.timeout, metrics.ended)
    metrics.watch(worker, patches.names, model.graph.bound_values, model.prefix_cache)

    completions = Completions(worker, patches, settings, folder.graph_digest[:12])

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        watching = asyncio.create_task(watch(watched))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(worker.drain, settings.drain)
            completions.close()

    app = FastAPIOffline(
        title="tp-runtime",
        version=metadata.version("tp-runtime"),
        summary=f"{patches.base} under thought patches",
        lifespan=lifespan,
    )
    app.state.worker = worker
    install(app)
    app.include_router(completions.router())
    facts = model_facts(folder, settings, model.prefix_cache is not None)
    app.include_router(_models(patches, settings, facts))
    app.include_router(_state(worker, metrics))
    app.mount("/static", _Fresh(directory=_PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    app.add_middleware(partial(Guard, settings=settings, answered=metrics.answered))  # type: ignore[arg-type]
    if settings.origins:  # outermost: a browser asks without a key first, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    _document(app, settings)
    return app


def _document(app: FastAPI, settings: ServerSettings) -> None:
    """Make the OpenAPI document say what this server does: errors of bodies are 400, and where a key is needed."""
    made = app.openapi

    def openapi() -> Json:
        first = app.openapi_schema is None
        document = made()
        if first:
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if settings.api_keys and path.startswith(("/v1", "/metrics")):
                        operation["security"] = [{"key": []}]
            schemas = document.get("components", {}).get("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            if settings.api_keys:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


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
        return [own, *patch_cards()]

    def patch_cards() -> list[Json]:
        return [model_card(name, patch, started) for name, patch in sorted(patches.names().items())]

    @router.get(
        "/models", summary="List what the field model can name", response_model=ModelList, responses=documented()
    )
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": cards()})

    @router.get(
        "/models/{name}",
        summary="Describe the model or a patch",
        response_model=ModelCard,
        responses=documented(400, 404),
    )
    async def one(name: str) -> JSONResponse:
        choice, _label = await asyncio.to_thread(patches.choice, name, None)
        patch = patches.names().get(choice) if isinstance(choice, str) else choice
        card = model_card(name, patch, started)
        return JSONResponse(card if patch is not None else {**card, "model": facts})

    @router.get("/patches", summary="List the loaded patches", response_model=ModelList, responses=documented())
    async def listed() -> JSONResponse:
        return JSONResponse({"object": "list", "data": patch_cards()})

    def require_managed() -> None:
        if not settings.manage_patches:
            raise DisabledError(
                "this server does not load or unload patches on request",
                field="server",
                got="manage_patches: off",
                wanted="manage_patches: on",
                fix="start it with --patch-dir DIR --manage-patches",
            )

    @router.post(
        "/patches",
        status_code=201,
        summary="Load a patch file of the server's folder",
        response_model=ModelCard,
        responses=documented(400, 403, 408, 409, 413),
    )
    async def load(body: PatchBody) -> JSONResponse:
        require_managed()
        patch = await asyncio.to_thread(patches.load, body.name, body.file)
        return JSONResponse(model_card(body.name, patch, started), 201)

    @router.delete(
        "/patches/{name}",
        status_code=204,
        summary="Unload a patch",
        responses=documented(400, 403, 404, 409),
        response_model=None,
    )
    async def unload(name: str) -> Response:
        require_managed()
        await asyncio.to_thread(patches.unload, name)
        return Response(status_code=204)

    return router


def _state(worker: Worker, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    misdirected: dict[int | str, Json] = {421: documented()[421]}

    @router.get("/health", summary="Whether the process lives", response_model=State, responses=misdirected)
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get(
        "/ready",
        summary="Whether requests are accepted",
        response_model=State,
        responses={**misdirected, 503: {"model": State, "description": "The server is shutting down."}},
    )
    async def ready() -> JSONResponse:
        accepting = worker.accepting
        return JSONResponse({"status": "ready" if accepting else "not ready"}, 200 if accepting else 503)

    @router.get(
        "/metrics",
        response_class=Response,
        summary="Metrics for Prometheus",
        responses={**documented(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    return router

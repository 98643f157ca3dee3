"""The service: its parts put together, and the routes that inspect and that tell its state."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service import (
    __version__,
    calibration_routes,
    cores,
    model_routes,
    trace_routes,
    uploads,
    watch_routes,
)
from service.access import METRICS, Access, needs
from service.alarms import Alarms
from service.calibrator import Calibrator
from service.database import Database
from service.edge import (
    BINARY,
    CLIENT_CLOSED_REQUEST,
    Deadline,
    Digest,
    ModelName,
    Profile,
    RepeatedRoute,
    StrictRoute,
    Version,
    add_errors,
    caller,
    openapi,
    problems,
    unless_departed,
    within,
)
from service.errors import InvalidParameter, NotReady, SettingsError
from service.heatmap import MEDIA_TYPES, MediaType, Render
from service.image_archive import ImageArchive
from service.inspection import Inspected, Inspector
from service.inspections import Inspections
from service.intake import Intake
from service.keys import Keyring, Keys
from service.metrics import Metrics
from service.middleware import RequestRecord
from service.registry import Registry
from service.retention import Retention
from service.rollouts import Rollouts
from service.schemas import Inspection, State
from service.settings import Settings, is_loopback
from service.store import Store
from service.trace import Trace
from service.watch import Watch

log = logging.getLogger(__name__)

FOLLOW_S = 5.0  # for a question to the database that is under way when the service stops
INSPECT_BODY = {
    "required": True,
    "content": {
        "image/*": BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
    },
}


def create_app(settings: Settings) -> FastAPI:
    """The service, its models loaded and warm; raises ServiceError where they can't be."""
    metrics = Metrics()
    database = Database(settings.database_url)
    keyring = Keyring(Keys(database), settings.keys_file)
    _refuse_open_doors(keyring, settings)
    store = Store(database)
    rollouts = Rollouts(database)
    registry = Registry(settings, store, rollouts, metrics)
    workers = ThreadPoolExecutor(cores.available(), thread_name_prefix="pixels")
    inspections = Inspections(database)
    archive = ImageArchive(settings, metrics)
    trace = Trace(inspections, archive, metrics, settings.trace_max_pending)
    retention = Retention(inspections, settings.trace_max_age_days, settings.trace_max_count)
    inspector = Inspector(
        workers,
        metrics,
        settings.max_image_pixels,
        trace=trace if settings.trace else None,
        shadow_of=registry.shadow_of,
    )
    calibrator = Calibrator(registry, store, workers, settings)
    watch = Watch(registry, inspections, Alarms(database), metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stop = asyncio.Event()
        following = [
            asyncio.create_task(registry.follow(stop)),
            asyncio.create_task(keyring.follow(stop, settings.sync_interval_s)),
        ]
        if settings.trace:
            following.append(asyncio.create_task(watch.run(stop)))
        for thread in (archive, trace, retention):
            thread.start()
        yield
        stop.set()
        # A database that hangs keeps a thread; what was inspected must be written all the same.
        await asyncio.wait(following, timeout=FOLLOW_S)
        app.state.hangs = not await registry.close()
        workers.shutdown()
        # The trace after the archive, as it tells which images could be written.
        for thread in (retention, archive, trace):
            thread.close()
        database.close()

    app = FastAPI(
        title="SK-RD4AD visual inspection",
        version=__version__,
        summary="Pass or fail, and where, with a promised false-positive rate.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
    )
    app.state.leaving = app.state.hangs = False
    app.add_middleware(Access, keyring=keyring, open_metrics=settings.open_metrics)
    app.add_middleware(RequestRecord, metrics=metrics)
    add_errors(app)
    app.include_router(_inspection(registry, inspector, settings))
    app.include_router(calibration_routes.router(registry, calibrator, store, settings))
    app.include_router(trace_routes.router(inspections, trace, archive, registry, settings))
    app.include_router(watch_routes.router(registry, watch, settings))
    intake = Intake(registry, settings)
    app.include_router(model_routes.router(registry, rollouts, intake, settings))
    app.include_router(_operation(app, registry, metrics))
    document = openapi(app)
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


def _refuse_open_doors(keyring: Keyring, settings: Settings) -> None:
    """Raises SettingsError where everybody on the network could do everything, unasked."""
    if keyring.closed or is_loopback(settings.host):
        return
    if not settings.allow_anonymous:
        raise SettingsError(
            f"host {settings.host} is reachable from other machines, and without API keys anybody "
            "there could do anything: make one with `python -m service keys create`, or set "
            "SKRD4AD_ALLOW_ANONYMOUS=true if that is meant"
        )
    log.warning(
        "there are no API keys: whoever reaches %s may inspect, calibrate and change models",
        settings.host,
    )


def _inspection(registry: Registry, inspector: Inspector, settings: Settings) -> APIRouter:
    router = APIRouter(tags=["inspection"], route_class=RepeatedRoute)

    @router.post(
        "/v1/inspect",
        response_model=Inspection,
        openapi_extra={"requestBody": INSPECT_BODY},
        dependencies=[needs("inspect")],
        responses={
            200: {"content": {"image/png": BINARY, "image/jpeg": BINARY}},
            **problems(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
        },
    )
    async def inspect(
        request: Request,
        model: ModelName = None,
        version: Version = None,
        digest: Digest = None,
        profile: Profile = "",
        render: Annotated[
            Render,
            Query(
                description="the picture: heatmap at the model's size, or overlay or "
                "mask at the image's"
            ),
        ] = "heatmap",
        threshold: Annotated[
            float | None, Query(ge=1e-6, le=1e6, description="instead of the calibration's")
        ] = None,
        deadline: Deadline = None,
    ) -> Any:
        """Score one image: pass or fail, and where. `Accept: image/*` returns the picture itself,
        with the decision in headers: a PNG; an overlay as JPEG, or as PNG (slow, lossless) where
        only `image/png` is accepted."""
        started = time.perf_counter()
        picture_type = _picture_type(request, render)
        async with within(settings.request_timeout_s, deadline):
            chosen = await registry.get(model, version, digest)
            with chosen.batcher.place():
                data = await uploads.image(uploads.limited(request, settings.max_image_bytes))
                inspected = await unless_departed(
                    request,
                    inspector.inspect(
                        chosen,
                        data,
                        render=render,
                        profile=profile,
                        threshold=threshold,
                        request_id=request.state.request_id,
                        started=started,
                        picture_type=picture_type,
                        by=caller(request),
                    ),
                )
        if inspected is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if picture_type is not None:
            return _picture_response(inspected, picture_type)
        return Response(inspected.json, media_type="application/json")

    return router


def _operation(app: FastAPI, registry: Registry, metrics: Metrics) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.get("/livez", tags=["operation"], responses=problems(503))
    async def livez() -> State:
        """The process answers; 503 where the device doesn't come back, and only a new one helps."""
        registry.check_alive()
        return State(status="live")

    @router.get("/readyz", tags=["operation"], responses=problems(503))
    async def readyz() -> State:
        """Models are loaded and warm; 503 where there is none."""
        if app.state.leaving:
            raise NotReady("the service is going")
        registry.check_ready()
        loaded = registry.loaded()
        engines = sorted({model.detector.description for model in loaded})
        return State(status="ready", detail=f"{len(loaded)} loaded, on {'; '.join(engines)}")

    @router.get(
        METRICS, tags=["operation"], response_class=Response, dependencies=[needs("inspect")]
    )
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _picture_type(request: Request, render: Render) -> MediaType | None:
    """The type of picture that is wanted instead of JSON; None for JSON.

    Raises InvalidParameter where only pictures are accepted, of types that `render` doesn't have.
    """
    accept = request.headers.get("accept", "")
    accepted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    if "application/json" in accepted:
        return None
    for offered in MEDIA_TYPES[render]:
        if offered in accepted or "image/*" in accepted:
            return offered
    if all(kind.startswith("image/") for kind in accepted):
        offers = " or ".join(MEDIA_TYPES[render]) or "no picture"
        raise InvalidParameter(f"Accept {accept}: render={render} gives {offers}")
    return None


def _picture_response(inspected: Inspected, media_type: MediaType) -> Response:
    answer = inspected.inspection
    headers = {
        "X-Inspection-Id": answer.id,
        "X-Model": answer.model.name,
        "X-Model-Version": str(answer.model.version),
        "X-Model-Digest": answer.model.digest,
        "X-Image-Sha256": answer.image.sha256,
        "X-Score": repr(answer.score),
        "X-Threshold": repr(answer.threshold),
        "X-Threshold-Source": answer.threshold_source,
        "X-Decision": answer.decision,
        "X-Regions": str(len(answer.regions)),
    }
    if answer.calibration:
        headers |= {"X-P-Value": repr(answer.p_value), "X-Calibration-Id": answer.calibration.id}
    return Response(inspected.picture, media_type=media_type, headers=headers)

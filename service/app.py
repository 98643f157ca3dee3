"""The HTTP edge: routes, problem answers, OpenAPI. What happens to an image is in `inspection`."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service import __version__, uploads
from service.bundle import NAME_PATTERN
from service.errors import (
    DeadlineExceeded,
    InvalidParameter,
    ServiceError,
    TooFewSamples,
)
from service.heatmap import MEDIA_TYPES, MediaType, Render
from service.inspection import Inspected, Inspector
from service.metrics import Metrics
from service.middleware import RequestRecord
from service.registry import Registry
from service.schemas import (
    CalibrationOut,
    CalibrationReference,
    Inspection,
    ModelOut,
    NewCalibration,
    Problem,
    State,
)
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")
PROBLEM_JSON = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it but the log

ModelName = Annotated[
    str | None, Query(pattern=NAME_PATTERN, description="needless where there is only one")
]
Version = Annotated[int | None, Query(ge=1, description="default: the newest at start")]
Digest = Annotated[
    str | None,
    Query(pattern="^[0-9a-f]{64}$", description="refuse to answer with any other graph than this"),
]

Deadline = Annotated[
    int | None,
    Header(
        alias="X-Request-Timeout-Ms",
        ge=1,
        le=86_400_000,
        description="answer within these milliseconds or not at all; the service's own deadline "
        "stays in force",
    ),
]

_IMAGE_BYTES = {"schema": {"type": "string", "format": "binary"}}
INSPECT_BODY = {
    "required": True,
    "content": {
        "image/*": _IMAGE_BYTES,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
    },
}
CALIBRATE_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                    }
                },
            }
        }
    },
}


def create_app(settings: Settings) -> FastAPI:
    """The service, its models loaded and warm; raises ServiceError where they can't be."""
    metrics = Metrics()
    store = Store(settings.database_url)
    registry = Registry(settings, store, metrics)
    inspector = Inspector(registry, store, metrics, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        inspector.close()
        registry.close()
        store.close()

    app = FastAPI(
        title="SK-RD4AD visual inspection",
        version=__version__,
        summary="Pass or fail, and where, with a promised false-positive rate.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
    )
    app.router.route_class = _StrictRoute
    app.add_middleware(RequestRecord, metrics=metrics)
    app.add_exception_handler(Exception, _answer_problem)
    app.add_exception_handler(ClientDisconnect, _answer_departure)
    for kind in (ServiceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_problem)

    @app.post(
        "/v1/inspect",
        response_model=Inspection,
        openapi_extra={"requestBody": INSPECT_BODY},
        responses={
            200: {"content": {"image/png": _IMAGE_BYTES, "image/jpeg": _IMAGE_BYTES}},
            **_problems(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
        },
        tags=["inspection"],
    )
    async def inspect(
        request: Request,
        model: ModelName = None,
        version: Version = None,
        digest: Digest = None,
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
        async with _within(settings.request_timeout_s, deadline):
            chosen = await registry.get(model, version, digest)
            with chosen.batcher.place():
                data = await uploads.image(uploads.limited(request, settings.max_image_bytes))
                inspected = await _unless_departed(
                    request,
                    inspector.inspect(
                        chosen,
                        data,
                        render=render,
                        threshold=threshold,
                        request_id=request.state.request_id,
                        started=started,
                        picture_type=picture_type,
                    ),
                )
        if inspected is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if picture_type is not None:
            return _picture_response(inspected, picture_type)
        return Response(inspected.json, media_type="application/json")

    @app.post(
        "/v1/calibrate",
        response_model=NewCalibration,
        status_code=201,
        openapi_extra={"requestBody": CALIBRATE_BODY},
        responses=_problems(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
        tags=["calibration"],
    )
    async def calibrate(
        request: Request,
        model: ModelName = None,
        version: Version = None,
        digest: Digest = None,
        target_fpr: Annotated[
            float, Query(gt=0, lt=1, description="the false-positive rate to promise")
        ] = 0.01,
        activate: Annotated[bool, Query(description="use it from the next inspection on")] = True,
        deadline: Deadline = None,
    ) -> Any:
        """A threshold from pictures of normal parts that the model was not trained on."""
        async with _within(settings.calibration_timeout_s, deadline):
            chosen = await registry.get(model, version, digest)
            body = uploads.limited(request, settings.max_calibration_bytes)
            images = uploads.images(body, settings.max_calibration_images, settings.max_image_bytes)
            try:
                made = await inspector.calibrate(
                    chosen, images, target_fpr=target_fpr, activate=activate
                )
            except ExceptionGroup as group:  # of the tasks that scored; the first tells enough
                raise group.exceptions[0] from None
        return Response(made.model_dump_json(), 201, media_type="application/json")

    @app.post(
        "/v1/calibrations/{id}/activate",
        tags=["calibration"],
        responses=_problems(404, 409, 422, 500, 503, 504),
    )
    async def activate(id: Annotated[str, Path(max_length=64)]) -> CalibrationOut:
        """Use a calibration that was made before: an earlier one, or one kept for later."""
        async with _within(settings.request_timeout_s):
            return await inspector.activate(id)

    @app.post(
        "/v1/calibrations/deactivate",
        tags=["calibration"],
        responses=_problems(404, 409, 422, 500, 503, 504),
    )
    async def deactivate(model: ModelName = None, version: Version = None) -> CalibrationReference:
        """Go back to the threshold that the model's own bundle brought."""
        async with _within(settings.request_timeout_s):
            return await inspector.deactivate(await registry.get(model, version))

    @app.get("/v1/models", tags=["models"])
    def models() -> list[ModelOut]:
        """The loaded models, with digest, threshold and calibration in force."""
        return [ModelOut.of(loaded, registry.versions(loaded.name)) for loaded in registry.loaded()]

    @app.get("/v1/calibrations", tags=["calibration"], responses=_problems(422))
    def calibrations(
        model: ModelName = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> list[CalibrationOut]:
        """Calibrations that were made, newest first."""
        return [CalibrationOut.of(calibration) for calibration in store.list(model, limit)]

    @app.get("/livez", tags=["operation"])
    async def livez() -> State:
        """The process answers."""
        return State(status="live")

    @app.get("/readyz", tags=["operation"], responses=_problems(503))
    async def readyz() -> State:
        """Models are loaded and warm; 503 where there is none."""
        registry.check_ready()
        loaded = registry.loaded()
        engines = sorted({model.detector.description for model in loaded})
        return State(status="ready", detail=f"{len(loaded)} loaded, on {'; '.join(engines)}")

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    document = _openapi(app)
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


class _StrictRoute(APIRoute):
    """Refuses a misspelt parameter, which would otherwise leave its default in force unseen.

    Probes and scrapers may add what they like.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if not self.path.startswith("/v1/"):
            return handle
        known = {parameter.alias for parameter in self.dependant.query_params}

        async def check_and_handle(request: Request) -> Response:
            for name in request.query_params:
                if name not in known:
                    raise InvalidParameter(
                        f"unknown parameter {name!r}; there are: "
                        f"{', '.join(sorted(known)) or 'none'}"
                    )
            return await handle(request)

        return check_and_handle


@asynccontextmanager
async def _within(seconds: float, asked_ms: int | None = None) -> AsyncIterator[None]:
    """Raises DeadlineExceeded after `seconds`, or earlier where the caller asked for that."""
    if asked_ms is not None:
        seconds = min(seconds, asked_ms / 1e3)
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"not answered within {seconds:g} s") from None


async def _unless_departed(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None where the client left first, which cancels it.

    Starlette doesn't cancel a handler whose client has gone. The body must have been read.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.create_task(_departure(request))
    try:
        await asyncio.wait((task, departure), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        departure.cancel()
        del task  # which has the error, whose traceback has this frame


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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


def _answer_departure(request: Request, error: Exception) -> Response:
    """The client left while it was sending: nobody's fault, and no error in the counters."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _answer_problem(request: Request, error: Exception) -> Response:
    """Any exception as RFC 9457 problem+json, with the status of the tree in `errors`."""
    extra: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if isinstance(error, ServiceError):
        kind, title, status, detail = type(error).__name__, error.title, error.status, str(error)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, TooFewSamples):
            extra = {"samples": error.samples, "min_samples_needed": error.needed}
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        kind, title, status = "InvalidParameter", InvalidParameter.title, InvalidParameter.status
        detail = f"{first['loc'][-1]} = {first.get('input')!r}: {first['msg']}"
    elif isinstance(error, HTTPException):
        status = error.status_code
        title = HTTPStatus(status).phrase
        kind = title.title().replace(" ", "")
        detail = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
    else:
        log.error("request_id=%s failed", request.state.request_id, exc_info=error)
        kind, title, status = "Internal", "Internal error", 500
        detail = "the service failed; its log has the reason under this request_id"
    if status >= 500 and isinstance(error, ServiceError):
        log.error("request_id=%s %s: %s", request.state.request_id, kind, detail)
    slug = re.sub(r"(?<!^)(?=[A-Z])", "-", kind).lower()
    problem = Problem(
        type=f"urn:skrd4ad:problem:{slug}",
        title=title,
        status=status,
        detail=detail,
        request_id=request.state.request_id,
        **extra,
    )
    headers["X-Request-Id"] = request.state.request_id
    return JSONResponse(problem.model_dump(), status, headers, media_type=PROBLEM_JSON)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route can answer with; `_openapi` gives them a body."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with every error as the problem+json that it really is."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        license_info=app.license_info,
        routes=app.routes,
    )
    body = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for methods in document["paths"].values():
        for route in methods.values():
            for status, response in route["responses"].items():
                if int(status) >= 400:
                    response["content"] = body
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = Problem.model_json_schema()
    return document

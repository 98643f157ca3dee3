"""What all routes share: parameters, deadlines, and errors as RFC 9457 problem+json."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import cache, wraps
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from service.bundle import NAME_PATTERN
from service.errors import (
    DeadlineExceeded,
    InvalidParameter,
    ServiceError,
    TooFewSamples,
    Unauthorized,
)
from service.schemas import Problem

log = logging.getLogger(__name__)

T = TypeVar("T")
PROBLEM_JSON = "application/problem+json"
MAX_REPEATED = 64  # queries, of 64 KB at most, that a route remembers
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it but the log

BINARY = {"schema": {"type": "string", "format": "binary"}}  # a body, in OpenAPI

Name = Annotated[str, Path(pattern=NAME_PATTERN)]  # of a model, in a path
Limit = Annotated[int, Query(ge=1, le=1000)]
ModelName = Annotated[
    str | None, Query(pattern=NAME_PATTERN, description="needless where there is only one")
]
Version = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="default: the active one")]
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

Profile = Annotated[
    str,
    Query(
        pattern=f"{NAME_PATTERN}|^$",
        description="camera, station or variant with a calibration of its own; without one, the "
        "model's is in force",
    ),
]


def add_errors(app: FastAPI) -> None:
    """Every error of the app's routes is a problem, in its answers and in its OpenAPI."""
    app.add_exception_handler(Exception, answer_problem)
    app.add_exception_handler(ClientDisconnect, _answer_departure)
    for kind in (ServiceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_problem)


def caller(request: Request) -> str:
    """Who asks, by the name of their key."""
    return str(request.state.key.name)


class StrictRoute(APIRoute):
    """Refuses a misspelt parameter, which would otherwise leave its default in force unseen.

    Probes and scrapers may add what they like.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if not self.path.startswith("/v1/"):
            return handle
        known = {p.alias for each in _with_all(self.dependant) for p in each.query_params}

        async def check_and_handle(request: Request) -> Response:
            for name in request.query_params:
                if name not in known:
                    raise InvalidParameter(
                        f"unknown parameter {name!r}; there are: "
                        f"{', '.join(sorted(known)) or 'none'}"
                    )
            return await handle(request)

        return check_and_handle


class RepeatedRoute(StrictRoute):
    """For what is asked the same thousands of times an hour: what FastAPI made of a query and its
    headers is taken again for the same from a key of the same scope.

    To make it is a large part of what the event loop does for an image. For routes
    whose parameters are a query's and single headers alone, which return a Response, and whose
    dependencies look at nothing but the key's scope; raises TypeError for others, as far as they
    can be told.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        @wraps(endpoint)
        async def remembered(request: Request, **parameters: Any) -> Any:
            request.state.parameters = parameters
            return await endpoint(request, **parameters)

        self._answer = endpoint
        super().__init__(path, remembered, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        _check_repeatable(self.dependant)
        headers = [parameter.alias for parameter in self.dependant.header_params]
        made: dict[tuple[Any, ...], dict[str, Any]] = {}

        async def repeat_or_handle(request: Request) -> Response:
            asked = (
                request.scope["query_string"],
                request.state.key.scope,
                *(request.headers.get(name) for name in headers),
            )
            if asked in made:
                answer: Response = await self._answer(request, **made[asked])
                return answer
            answer = await handle(request)
            if len(made) == MAX_REPEATED:
                del made[next(iter(made))]
            made[asked] = request.state.parameters
            return answer

        return repeat_or_handle


def _check_repeatable(route: Dependant) -> None:
    """Raises TypeError where the same query may come with other parameters."""
    for each in _with_all(route):
        headers = [] if each is route else each.header_params
        for other in (*each.path_params, *each.cookie_params, *each.body_params, *headers):
            raise TypeError(f"{other.name} may differ where the query is the same")


def _with_all(dependant: Dependant) -> Iterator[Dependant]:
    """A route, and what it depends on."""
    yield dependant
    for dependency in dependant.dependencies:
        yield from _with_all(dependency)


@asynccontextmanager
async def within(seconds: float, asked_ms: int | None = None) -> AsyncIterator[None]:
    """Raises DeadlineExceeded after `seconds`, or earlier where the caller asked for that."""
    if asked_ms is not None:
        seconds = min(seconds, asked_ms / 1e3)
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"not answered within {seconds:g} s") from None


async def unless_departed(request: Request, work: Awaitable[T]) -> T | None:
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


def _answer_departure(request: Request, error: Exception) -> Response:
    """The client left while it was sending: nobody's fault, and no error in the counters."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def answer_problem(request: Request, error: Exception) -> Response:
    """Any exception as RFC 9457 problem+json, with the status of the tree in `errors`."""
    extra: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if isinstance(error, ServiceError):
        kind, title, status, detail = type(error).__name__, error.title, error.status, str(error)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
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
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = _methods(request) or headers.get("Allow", "")
    else:
        log.error("request_id=%s failed", request.state.request_id, exc_info=error)
        kind, title, status = "Internal", "Internal error", 500
        detail = "the service failed; its log has the reason under this request_id"
    if status >= 500 and isinstance(error, ServiceError):
        # 503 and 504 tell of the moment, and probes ask every few seconds.
        level = logging.ERROR if status == 500 else logging.WARNING
        log.log(level, "request_id=%s %s: %s", request.state.request_id, kind, detail)
    detail = detail.encode(errors="replace").decode()  # it may name what was sent
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


def _methods(request: Request) -> str | None:
    """What a path can be asked for; Starlette tells the first route's alone. None: not told."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    path = request.scope["path"]
    matching = [path] if path in paths else [each for each in paths if _regex(each).match(path)]
    return ", ".join(sorted({m.upper() for each in matching for m in paths[each]})) or None


@cache
def _regex(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route can answer with; `openapi` gives them a body."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses}


def _never_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter is left out, not null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return schema
    only: dict[str, Any] = kinds[0]
    return {key: value for key, value in schema.items() if key != "anyOf"} | only


def openapi(app: FastAPI) -> dict[str, Any]:
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
            for parameter in route.get("parameters", ()):
                parameter["schema"] = _never_null(parameter["schema"])
            if "security" in route:
                route["responses"] |= {str(k): v for k, v in problems(401, 403, 429).items()}
            for status, response in route["responses"].items():
                if int(status) >= 400:
                    response["content"] = body
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = Problem.model_json_schema()
    return document

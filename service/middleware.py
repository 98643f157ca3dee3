"""Around every request: its id, its line in the log, its place in the counters. Pure ASGI, so
that a client's departure still reaches the handler."""

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.edge import answer_problem
from service.errors import NotReady
from service.metrics import Metrics

log = logging.getLogger("service.access")

REQUEST_ID_PATTERN = "^[A-Za-z0-9._:-]{1,128}$"
_SAFE_ID = re.compile(REQUEST_ID_PATTERN.encode())
_QUIET = ("/livez", "/readyz", "/metrics")  # asked every few seconds by machines
# Other methods are counted together: each label value is a time series, and callers invent them.
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class RequestRecord:
    """Takes `X-Request-Id` from the caller, or makes one, and returns it with the answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if scope["app"].state.leaving:  # the next request goes elsewhere
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # by the server, which goes
            if not status:
                refusal = NotReady("the service is going, and broke this request off")
                await answer_problem(Request(scope), refusal)(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status or 500, time.perf_counter() - started)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = _route(scope)
        self._metrics.requests.labels(method, route, str(status)).inc()
        log.log(
            logging.DEBUG if route in _QUIET else logging.INFO,
            "%s %s %d %.1fms request_id=%s by=%s",
            method,
            scope["path"].encode("unicode_escape").decode(),  # no forged lines
            status,
            1e3 * seconds,
            request_id,
            getattr(scope["state"].get("key"), "name", "nobody"),
        )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SAFE_ID.fullmatch(value):
            return str(value.decode())
    return uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The route's template; every unknown path is one label value."""
    route: Any = scope.get("route")
    return getattr(route, "path", "unknown")

"""Who may ask for what: a key for every route but the probes, once there is one, and a scope for
each."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security, params
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from starlette.types import ASGIApp, Receive, Scope, Send

from service import keys
from service.edge import answer_problem
from service.errors import Forbidden, ServiceError, TooOften, Unauthorized
from service.keys import ANONYMOUS, Key, Keyring

log = logging.getLogger(__name__)

PROBES = frozenset({"/livez", "/readyz"})
METRICS = "/metrics"
_ANYBODY = Key(ANONYMOUS, "admin")  # while there are no keys
_PROBE = Key(ANONYMOUS, "inspect")

# For the OpenAPI alone: `Access` has looked for the key before any of them runs.
_BEARER = HTTPBearer(auto_error=False, description="`Authorization: Bearer <key>`")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="the same, without scheme")


def needs(scope: keys.Scope) -> params.Depends:
    """What a route declares that wants keys of this scope, or a higher one."""
    declared: params.Depends = Security(_check, scopes=[scope])
    return declared


async def _check(
    request: Request,
    needed: SecurityScopes,
    bearer: Annotated[object, Depends(_BEARER)],
    header: Annotated[object, Depends(_HEADER)],
) -> None:
    key: Key = request.state.key
    for scope in keys.SCOPES:
        if scope in needed.scopes and not key.may(scope):
            raise Forbidden(f"the key {key.name} has the scope {key.scope}; this wants {scope}")


@dataclass
class _Allowance:
    """A token bucket: `rate` requests a second, and as many at once after a second's rest."""

    rate: float
    tokens: float
    at: float  # seconds, of the last look

    def take(self, now: float) -> None:
        """Raises TooOften where there is nothing left."""
        most = max(1.0, self.rate)
        self.tokens = min(most, self.tokens + self.rate * (now - self.at))
        self.at = now
        if self.tokens < 1:
            wait_s = (1 - self.tokens) / self.rate
            raise TooOften(
                f"the key allows {self.rate:g} requests a second: try again in {wait_s:.2g} s",
                math.ceil(wait_s),
            )
        self.tokens -= 1


class Access:
    """Lets nobody in without a key that is in force, and none more often than it allows.

    Before everything else, so that a route that forgot its scope is no open one. Pure ASGI, as
    `middleware` says.
    """

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        *,
        open_metrics: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._keyring, self._now = app, keyring, now
        self._open = PROBES | {METRICS} if open_metrics else PROBES
        self._allowances: dict[str, _Allowance] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                request.state.key = await self._known(request)
                self._take_turn(request.state.key)
            except ServiceError as error:
                if isinstance(error, Unauthorized):
                    log.warning("request_id=%s refused: %s", request.state.request_id, error)
                await answer_problem(request, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _known(self, request: Request) -> Key:
        if request.scope["path"] in self._open:
            return _PROBE
        if not self._keyring.closed:
            return _ANYBODY
        token = _token(request)
        if token is None:
            raise Unauthorized(
                "a key is needed, as `Authorization: Bearer <key>` or `X-API-Key: <key>`"
            )
        return await self._keyring.find(token)

    def _take_turn(self, key: Key) -> None:
        if key.max_rate is None:
            return
        now = self._now()
        allowance = self._allowances.get(key.hash)
        if allowance is None:
            allowance = _Allowance(key.max_rate, max(1.0, key.max_rate), now)
            self._allowances[key.hash] = allowance
        allowance.take(now)


def _token(request: Request) -> str | None:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    token = request.headers.get("x-api-key")
    return token.strip() if token is not None else None

"""The routes of drift: whether a model's images still score as its calibration's did."""

import asyncio
from functools import partial

from fastapi import APIRouter, Request

from service.access import needs
from service.completion import on_thread_to_end
from service.edge import Name, Profile, StrictRoute, Version, caller, problems, within
from service.errors import NothingWatched
from service.model import Model
from service.registry import Registry
from service.schemas import DriftOut
from service.settings import Settings
from service.watch import Report, Watch


def router(registry: Registry, watch: Watch, settings: Settings) -> APIRouter:
    router = APIRouter(tags=["drift"], route_class=StrictRoute, dependencies=[needs("calibrate")])

    @router.get("/v1/models/{name}/drift", responses=problems(404, 409, 422, 500, 503, 504))
    async def drift(name: Name, version: Version = None, profile: Profile = "") -> DriftOut:
        """Whether images decided normal still score as the calibration's did."""
        async with within(settings.request_timeout_s):
            model = await registry.get(name, version)
        report = await asyncio.to_thread(watch.look, model, profile)
        return _told(model, profile, report, settings)

    @router.post("/v1/models/{name}/drift/reset", responses=problems(404, 409, 422, 500, 503, 504))
    async def reset(
        name: Name, request: Request, version: Version = None, profile: Profile = ""
    ) -> DriftOut:
        """Begin a new test: the cause of an alarm was mended."""
        async with within(settings.request_timeout_s):
            model = await registry.get(name, version)
            reset = partial(watch.reset, model, profile, by=caller(request))
            report = await on_thread_to_end(reset)
        return _told(model, profile, report, settings)

    return router


def _told(model: Model, profile: str, report: Report | None, settings: Settings) -> DriftOut:
    if report is None:
        shown = f"{model.name} version {model.bundle.version}"
        shown += f", profile {profile}" if profile else ""
        reason = "has no calibration, or its test has not begun yet"
        if not settings.trace:
            reason = "isn't tested for drift: inspections are not recorded (SKRD4AD_TRACE)"
        raise NothingWatched(f"{shown} {reason}")
    return DriftOut.of(model, profile, report)

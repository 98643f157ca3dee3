"""The routes of models: listed, uploaded, loaded, activated, taken back, tried beside another."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from service import uploads
from service.access import needs
from service.edge import BINARY, Digest, Name, StrictRoute, caller, problems, within
from service.intake import Intake
from service.registry import Registry
from service.rollouts import Rollouts
from service.schemas import Activated, ModelDetail, ModelOut, ShadowOut
from service.settings import Settings

HISTORY = 100  # activations that are told with a model

Version = Annotated[int, Path(ge=1, lt=2**31)]
LOADS = problems(404, 409, 422, 429, 500, 503, 504)


BUNDLE_BODY = {
    "required": True,
    "content": {"application/zip": BINARY},
}


def router(registry: Registry, rollouts: Rollouts, intake: Intake, settings: Settings) -> APIRouter:
    router = APIRouter(tags=["models"], route_class=StrictRoute)

    async def told(name: str, version: int) -> ModelOut:
        listed = await registry.listed(name)
        return next(ModelOut.of(each) for each in listed if each.version == version)

    @router.get("/v1/models", dependencies=[needs("inspect")], responses=problems(500))
    async def models() -> list[ModelOut]:
        """Every version of every model on disk: active, loaded or neither."""
        return [ModelOut.of(listed) for listed in await registry.listed()]

    @router.post(
        "/v1/models",
        dependencies=[needs("admin")],
        response_model=ModelOut,
        status_code=201,
        openapi_extra={"requestBody": BUNDLE_BODY},
        responses=problems(400, 409, 413, 415, 422, 429, 500, 503, 504),
    )
    async def upload(
        request: Request,
        digest: Digest = None,
        activate: Annotated[bool, Query(description="let it answer at once")] = False,
    ) -> Any:
        """Add a version: a zip of `manifest.json`, `model.onnx` and `golden.png`. It is there once
        it was loaded and has passed its self-check; else nothing stays of it."""
        async with within(settings.load_timeout_s):
            body = uploads.bundle(uploads.limited(request, settings.max_bundle_bytes))
            model = await intake.take(body, digest, by=caller(request))
            if activate:
                await registry.activate(*model.key, by=caller(request))
        made = await told(*model.key)
        return Response(made.model_dump_json(), 201, media_type="application/json")

    @router.get(
        "/v1/models/{name}", dependencies=[needs("inspect")], responses=problems(404, 422, 500, 503)
    )
    async def model(name: Name) -> ModelDetail:
        """One model: its versions, and who let which one serve when."""
        listed = await registry.listed(name)
        activations = await run_in_threadpool(rollouts.history, name, HISTORY)
        return ModelDetail.of(name, listed, registry.refusals(name), activations)

    @router.post(
        "/v1/models/{name}/versions/{version}/activate",
        dependencies=[needs("admin")],
        responses=LOADS,
    )
    async def activate(name: Name, version: Version, request: Request) -> Activated:
        """Let a version answer, from the next request on. It is loaded, warmed up and checked
        beside the one that serves, which goes on where anything fails."""
        async with within(settings.load_timeout_s):
            return Activated.of(await registry.activate(name, version, by=caller(request)))

    @router.post("/v1/models/{name}/roll-back", dependencies=[needs("admin")], responses=LOADS)
    async def roll_back(name: Name, request: Request) -> Activated:
        """Let the version answer that did before the last activation; once more, one step
        further."""
        async with within(settings.load_timeout_s):
            return Activated.of(await registry.roll_back(name, by=caller(request)))

    @router.post(
        "/v1/models/{name}/versions/{version}/load", dependencies=[needs("admin")], responses=LOADS
    )
    async def load(name: Name, version: Version) -> ModelOut:
        """Load a version, warm it up and check it, so that the first request for it needn't
        wait."""
        async with within(settings.load_timeout_s):
            await registry.get(name, version)
        return await told(name, version)

    @router.post(
        "/v1/models/{name}/versions/{version}/unload",
        dependencies=[needs("admin")],
        responses=problems(404, 409, 422),
    )
    async def unload(name: Name, version: Version) -> ModelOut:
        """Free a version once it has answered what it began. Not the active one, nor the one that
        is tried beside it."""
        await registry.unload(name, version)
        return await told(name, version)

    @router.put("/v1/models/{name}/shadow", dependencies=[needs("admin")], responses=LOADS)
    async def set_shadow(
        name: Name,
        request: Request,
        version: Annotated[int, Query(ge=1, lt=2**31, description="that is to be tried")],
    ) -> ShadowOut:
        """Let a version score the same images as the active one: differences are counted, answers
        stay as they are."""
        async with within(settings.load_timeout_s):
            await registry.set_shadow(name, version, by=caller(request))
        return ShadowOut.of(*await registry.shadow(name))

    @router.get(
        "/v1/models/{name}/shadow",
        dependencies=[needs("inspect")],
        responses=problems(404, 422, 503),
    )
    async def shadow(name: Name) -> ShadowOut:
        """What the version that is tried, or was last, decided otherwise than the active one. The
        log names each inspection that it did of."""
        return ShadowOut.of(*await registry.shadow(name))

    @router.delete(
        "/v1/models/{name}/shadow",
        dependencies=[needs("admin")],
        status_code=204,
        responses=problems(404, 422, 503),
    )
    async def end_shadow(name: Name, request: Request) -> None:
        """Try the version no longer."""
        await registry.end_shadow(name, by=caller(request))

    return router

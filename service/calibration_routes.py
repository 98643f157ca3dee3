"""The routes of calibrations: made at once or over time, examined, put in force and taken back."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from service import uploads
from service.access import needs
from service.archives import CONTENT_TYPES
from service.calibrator import Activate, Calibrator, Promise
from service.edge import (
    BINARY,
    Deadline,
    Digest,
    Limit,
    ModelName,
    Profile,
    StrictRoute,
    Version,
    caller,
    problems,
    within,
)
from service.registry import Registry
from service.schemas import (
    ActivationOut,
    CalibrationDetail,
    CalibrationOut,
    CalibrationReference,
    Failure,
    NewCalibration,
    SampleOut,
    SamplesAdded,
)
from service.settings import Settings
from service.store import Store

_FORM = {
    "schema": {
        "type": "object",
        "required": ["images"],
        "properties": {
            "images": {"type": "array", "items": {"type": "string", "format": "binary"}}
        },
    }
}
SAMPLES_BODY = {
    "required": True,
    "content": {"multipart/form-data": _FORM, **dict.fromkeys(CONTENT_TYPES, BINARY)},
}

Id = Annotated[str, Path(pattern="^[a-z0-9_]{1,64}$")]
Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
TargetFpr = Annotated[float, Query(ge=1e-6, lt=1, description="the false-positive rate to promise")]
Confidence = Annotated[
    float | None,
    Query(
        ge=0.5,
        lt=1,
        description="keep the rate with this probability over calibrations, not only on average; "
        "needs more samples",
    ),
]
Activation = Annotated[
    Activate,
    Query(
        description="use it from the next inspection on; by default unless its highest samples "
        "stand apart from the others, as defects would"
    ),
]


def router(
    registry: Registry, calibrator: Calibrator, store: Store, settings: Settings
) -> APIRouter:
    router = APIRouter(
        tags=["calibration"], route_class=StrictRoute, dependencies=[needs("calibrate")]
    )

    def images(request: Request) -> Any:
        body = uploads.limited(request, settings.max_calibration_bytes)
        return uploads.images(body, settings.max_calibration_images, settings.max_image_bytes)

    @router.post(
        "/v1/calibrate",
        response_model=NewCalibration,
        status_code=201,
        openapi_extra={"requestBody": SAMPLES_BODY},
        responses=problems(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
    )
    async def calibrate(
        request: Request,
        model: ModelName = None,
        version: Version = None,
        digest: Digest = None,
        profile: Profile = "",
        target_fpr: TargetFpr = 0.01,
        confidence: Confidence = None,
        activate: Activation = "unless_suspect",
        deadline: Deadline = None,
    ) -> Any:
        """A threshold from pictures of normal parts that the model was not trained on."""
        promise = Promise(target_fpr, confidence, activate)
        async with within(settings.calibration_timeout_s, deadline):
            chosen = await registry.get(model, version, digest)
            examined, scored = await calibrator.calibrate(
                chosen, images(request), promise, profile=profile, by=caller(request)
            )
        made = NewCalibration.of_samples(examined, scored)
        return Response(made.model_dump_json(), 201, media_type="application/json")

    @router.post(
        "/v1/calibrations", status_code=201, responses=problems(404, 409, 422, 500, 503, 504)
    )
    async def open(
        request: Request,
        model: ModelName = None,
        version: Version = None,
        digest: Digest = None,
        profile: Profile = "",
        source: Annotated[
            str | None,
            Query(
                pattern="^[a-z0-9_]{1,64}$",
                description="begin with the samples of this calibration",
            ),
        ] = None,
    ) -> CalibrationDetail:
        """Open a calibration, to be filled in as many requests as it takes, and then finished."""
        async with within(settings.request_timeout_s):
            chosen = await registry.get(model, version, digest)
            opened = await calibrator.open(
                chosen, profile=profile, source=source, by=caller(request)
            )
        return CalibrationDetail.of_examined(opened)

    @router.post(
        "/v1/calibrations/{id}/samples",
        response_model=SamplesAdded,
        openapi_extra={"requestBody": SAMPLES_BODY},
        responses=problems(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
    )
    async def add_samples(id: Id, request: Request, deadline: Deadline = None) -> Any:
        """Score pictures of normal parts into an open calibration: files of a form, or a zip or
        tar. What it has already is not scored again, so that a request that broke off can be sent
        again as it was."""
        async with within(settings.calibration_timeout_s, deadline):
            counts, scored = await calibrator.add_samples(id, images(request))
        added = SamplesAdded(
            id=id,
            added=len(scored.samples),
            samples=counts.counted,
            excluded=counts.excluded,
            duplicates=scored.duplicates,
            failed=[Failure(name=name, reason=reason) for name, reason in scored.failed],
        )
        return Response(added.model_dump_json(), media_type="application/json")

    @router.post("/v1/calibrations/{id}/finish", responses=problems(404, 409, 422, 500, 503, 504))
    async def finish(
        id: Id,
        request: Request,
        target_fpr: TargetFpr = 0.01,
        confidence: Confidence = None,
        activate: Activation = "unless_suspect",
    ) -> CalibrationDetail:
        """Make the threshold. A finished calibration never changes."""
        async with within(settings.request_timeout_s):
            promise = Promise(target_fpr, confidence, activate)
            return CalibrationDetail.of_examined(
                await calibrator.finish(id, promise, by=caller(request))
            )

    @router.get("/v1/calibrations", responses=problems(422, 503))
    def calibrations(
        model: ModelName = None,
        profile: Annotated[Profile | None, Query(description="of this profile alone")] = None,
        limit: Limit = 100,
    ) -> list[CalibrationOut]:
        """Calibrations, newest first."""
        return [CalibrationOut.of(stored) for stored in store.find(model, profile, limit)]

    @router.get("/v1/calibrations/{id}", responses=problems(404, 422, 503))
    async def calibration(id: Id) -> CalibrationDetail:
        """A calibration and its highest samples: look at them, a defect among the samples raises
        the threshold unseen. A deleted one is still told."""
        return CalibrationDetail.of_examined(await calibrator.examine(id))

    @router.get("/v1/calibrations/{id}/samples", responses=problems(404, 422, 503))
    def samples(
        id: Id, limit: Limit = 100, offset: Annotated[int, Query(ge=0, le=10**9)] = 0
    ) -> list[SampleOut]:
        """The samples of a calibration, highest score first."""
        return [SampleOut.of(id, sample) for sample in store.samples(id, limit, offset)]

    @router.get(
        "/v1/calibrations/{id}/samples/{sha256}/heatmap",
        response_class=Response,
        responses={200: {"content": {"image/png": BINARY}}, **problems(404, 409, 422, 503)},
    )
    async def heatmap(id: Id, sha256: Sha256) -> Response:
        """Where a sample scored high; kept for the highest ones."""
        return Response(await calibrator.heatmap(id, sha256), media_type="image/png")

    @router.post(
        "/v1/calibrations/{id}/samples/{sha256}/exclude", responses=problems(404, 409, 422, 503)
    )
    def exclude(id: Id, sha256: Sha256) -> SampleOut:
        """Leave a sample out: it is no normal part."""
        store.exclude(id, sha256, True)
        return SampleOut.of(id, store.sample(id, sha256))

    @router.post(
        "/v1/calibrations/{id}/samples/{sha256}/include", responses=problems(404, 409, 422, 503)
    )
    def include(id: Id, sha256: Sha256) -> SampleOut:
        """Take a sample in again."""
        store.exclude(id, sha256, False)
        return SampleOut.of(id, store.sample(id, sha256))

    @router.post("/v1/calibrations/{id}/activate", responses=problems(404, 409, 422, 500, 503, 504))
    async def activate(id: Id, request: Request) -> CalibrationOut:
        """Use a finished calibration for its model and profile."""
        async with within(settings.request_timeout_s):
            return CalibrationOut.of(await calibrator.activate(id, by=caller(request)))

    @router.post("/v1/calibrations/deactivate", responses=problems(404, 409, 422, 500, 503, 504))
    async def deactivate(
        request: Request, model: ModelName = None, version: Version = None, profile: Profile = ""
    ) -> CalibrationReference:
        """Go back to the threshold that the model's own bundle brought; with a profile, to the
        model's calibration."""
        async with within(settings.request_timeout_s):
            chosen = await registry.get(model, version)
            return CalibrationReference.of(
                await calibrator.deactivate(chosen, profile, by=caller(request))
            )

    @router.post("/v1/calibrations/roll-back", responses=problems(404, 409, 422, 500, 503, 504))
    async def roll_back(
        request: Request, model: ModelName = None, version: Version = None, profile: Profile = ""
    ) -> CalibrationReference:
        """Go back to what was in force before the last activation; once more, one step further."""
        async with within(settings.request_timeout_s):
            chosen = await registry.get(model, version)
            return CalibrationReference.of(
                await calibrator.roll_back(chosen, profile, by=caller(request))
            )

    @router.delete("/v1/calibrations/{id}", status_code=204, responses=problems(404, 409, 422, 503))
    def delete(id: Id, request: Request) -> None:
        """Delete a calibration that is not in force. An open one is gone; a finished one leaves
        the lists, and can still be told by its id, for decisions that it made."""
        store.delete(id, by=caller(request))

    @router.get("/v1/activations", responses=problems(422, 503))
    def activations(model: ModelName = None, limit: Limit = 100) -> list[ActivationOut]:
        """Who put what in force when, newest first."""
        return [ActivationOut.of(activation) for activation in store.history(model, limit)]

    return router

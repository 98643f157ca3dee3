"""The routes of what was inspected: found, exported, looked at again, and judged by people."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime, BeforeValidator, ValidationError

from service import exports, uploads
from service.access import needs
from service.bundle import NAME_PATTERN
from service.calibration import Decision
from service.edge import BINARY, Limit, Name, Profile, StrictRoute, caller, problems, within
from service.errors import ImageNotKept, UnknownInspection, UnknownModel
from service.feedback import summaries
from service.image_archive import ImageArchive
from service.inspections import ID_PATTERN, Filter, Found, Inspections, new_id
from service.middleware import REQUEST_ID_PATTERN
from service.registry import Registry
from service.schemas import (
    FeedbackIn,
    FeedbackOut,
    InspectionDetail,
    ModelFeedback,
    RecordedInspection,
)
from service.schemas import Inspections as Page
from service.settings import Settings
from service.trace import Trace

T = TypeVar("T")


def _refuse_number(value: object) -> object:
    """Pydantic would take one as seconds, or as milliseconds, since 1970."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d.]+\s*", value):
        raise ValueError("a number is no moment: write 2026-11-26T10:00:00Z")
    return value


EXPORTED_TOGETHER = 1000  # inspections in memory at a time
MAX_FEEDBACK_BYTES = 16 * 2**10

Id = Annotated[str, Path(pattern=ID_PATTERN)]
Sha256 = Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="of the image's bytes")]
OfProfile = Annotated[Profile | None, Query(description="of this profile alone; empty: of none")]
OfVersion = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="of this version alone")]
Moment = Annotated[AwareDatetime | None, BeforeValidator(_refuse_number)]
Score = Annotated[float | None, Query(allow_inf_nan=False)]


def _filter(
    model: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    version: OfVersion = None,
    profile: OfProfile = None,
    decision: Decision | None = None,
    label: Annotated[Decision | None, Query(description="that feedback gave last")] = None,
    calibration: Annotated[str | None, Query(pattern="^[a-z0-9_]{1,32}$")] = None,
    request_id: Annotated[str | None, Query(pattern=REQUEST_ID_PATTERN)] = None,
    sha256: Sha256 = None,
    since: Annotated[Moment, Query(description="with its zone; that moment included")] = None,
    until: Annotated[Moment, Query(description="with its zone; that moment excluded")] = None,
    min_score: Score = None,
    max_score: Score = None,
) -> Filter:
    return Filter(
        model=model,
        version=version,
        profile=profile,
        decision=decision,
        label=label,
        calibration=calibration,
        request_id=request_id,
        sha256=sha256,
        since=since,
        until=until,
        min_score=min_score,
        max_score=max_score,
    )


Filtered = Annotated[Filter, Depends(_filter)]


def router(
    inspections: Inspections,
    trace: Trace,
    archive: ImageArchive,
    registry: Registry,
    settings: Settings,
) -> APIRouter:
    router = APIRouter(tags=["trace"], route_class=StrictRoute)

    def once_recorded(ask: Callable[[], T]) -> T:
        """What `ask` gives, after an inspection of a moment ago was recorded where it's that."""
        try:
            return ask()
        except UnknownInspection:
            if not trace.pending:
                raise
            trace.flush()
            return ask()

    @router.get("/v1/inspections", dependencies=[needs("calibrate")], responses=problems(422, 503))
    def find(
        filtered: Filtered,
        limit: Limit = 100,
        after: Annotated[str | None, Query(pattern=ID_PATTERN, description="`next`")] = None,
    ) -> Page:
        """Recorded inspections, newest first. New ones don't move those of later pages."""
        found = inspections.newest(filtered, limit + 1, after)
        page = [RecordedInspection.of(each) for each in found[:limit]]
        return Page(inspections=page, next=page[-1].id if len(found) > limit else None)

    @router.get(
        "/v1/inspections/export",
        dependencies=[needs("calibrate")],
        response_class=Response,
        responses={
            200: {"content": {media_type: BINARY for media_type in exports.MEDIA_TYPES.values()}},
            **problems(422, 503),
        },
    )
    async def export_all(filtered: Filtered, format: exports.Format = "csv") -> StreamingResponse:
        """All that were recorded until now, oldest first, as a stream. One that breaks off ends
        without its last chunk, so that it can't be taken for whole."""
        end = new_id()

        async def page(after: str | None) -> list[Found]:
            return await asyncio.to_thread(
                inspections.oldest, filtered, EXPORTED_TOGETHER, after=after, before=end
            )

        async def parts(found: list[Found]) -> AsyncIterator[bytes]:
            yield exports.head(format)
            while found:
                yield await asyncio.to_thread(exports.lines, format, found)
                found = await page(found[-1].record.id)

        name = f"inspections.{format}"
        return StreamingResponse(
            parts(await page(None)),  # the first, so that a database that is away is still a 503
            media_type=exports.MEDIA_TYPES[format],
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    @router.get(
        "/v1/inspections/{id}", dependencies=[needs("inspect")], responses=problems(404, 422, 503)
    )
    def inspection(id: Id) -> InspectionDetail:
        """One inspection, and what people said of it."""
        found = once_recorded(lambda: inspections.get(id))
        return InspectionDetail.of_feedback(found, inspections.feedback(id))

    @router.get(
        "/v1/inspections/{id}/image",
        dependencies=[needs("inspect")],
        response_class=Response,
        responses={200: {"content": {"image/*": BINARY}}, **problems(404, 422, 503)},
    )
    def image(id: Id) -> Response:
        """The picture that was inspected, byte by byte, where the archive has it."""
        record = once_recorded(lambda: inspections.get(id)).record
        if not record.archived:
            raise ImageNotKept(
                f"the image of inspection {id} was not archived: SKRD4AD_ARCHIVE says which are"
            )
        data, media_type = archive.read(record.sha256)
        # Whoever sent it chose the bytes: no browser is to find something else in them.
        headers = {"X-Content-Type-Options": "nosniff"}
        return Response(data, media_type=media_type, headers=headers)

    @router.post(
        "/v1/inspections/{id}/feedback",
        dependencies=[needs("inspect")],
        status_code=201,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": FeedbackIn.model_json_schema()}},
            }
        },
        responses=problems(404, 413, 422, 503, 504),
    )
    async def give_feedback(id: Id, request: Request) -> FeedbackOut:
        """Say what the part really was. The last word counts, and all are kept."""
        async with within(settings.request_timeout_s):
            given = _feedback(await uploads.limited(request, MAX_FEEDBACK_BYTES).body())

        def store() -> Any:
            return inspections.label(id, given.label, given.note, by=caller(request))

        return FeedbackOut(**vars(await asyncio.to_thread(once_recorded, store)))

    @router.get(
        "/v1/models/{name}/feedback",
        dependencies=[needs("calibrate")],
        responses=problems(404, 422, 503),
    )
    def model_feedback(
        name: Name,
        version: OfVersion = None,
        profile: OfProfile = None,
    ) -> list[ModelFeedback]:
        """Decisions beside what people said, for every graph of a model, and the threshold that
        would have been right most often. Nothing is changed by it."""
        found = summaries(inspections.labelled(name, version, profile))
        names = sorted({model.name for model in registry.loaded()})
        if not found and name not in names:
            raise UnknownModel(f"model {name!r} is none of: {', '.join(names)}")
        return [ModelFeedback.of(name, summary) for summary in found]

    return router


def _feedback(body: bytes) -> FeedbackIn:
    """Raises RequestValidationError, as FastAPI would, which reads bodies of any size."""
    try:
        return FeedbackIn.model_validate_json(body)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(errors) from None

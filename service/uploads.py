"""Request bodies -> encoded images: raw, as the files of a multipart form, or of an archive.

Bodies are refused as soon as they are known to pass a limit, and a form's files are handed on one
by one while the rest still arrives. Every byte is copied once, into the image that it belongs to.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request
from starlette.types import Message

from service import archives
from service.errors import InvalidForm, InvalidImage, InvalidParameter, TooLarge, UnsupportedFormat

FORM = "multipart/form-data"
MAX_FIELDS = 16  # of an inspection's form; enough to tell what is wrong with it


@dataclass
class Part:
    """A field of a form; a file where it has a file name."""

    name: str
    filename: str | None
    data: bytes


def limited(request: Request, limit: int) -> Request:
    """The request, refusing its body as soon as it is known to pass the limit.

    FastAPI's own limit answers a too large Content-Length in plain text, without a request id.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes; the limit is {limit}")
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise TooLarge(f"the body has at least {received} bytes; the limit is {limit}")
        return message

    return Request(request.scope, receive)


async def image(request: Request) -> bytes:
    """The encoded image of a raw `image/*` body or of the multipart field `image`.

    Raises InvalidForm, InvalidImage or UnsupportedFormat.
    """
    content_type = _content_type(request)
    if content_type == FORM:
        fields = [part async for part in parts(request, MAX_FIELDS)]
        if [field.name for field in fields] != ["image"] or fields[0].filename is None:
            raise InvalidImage(
                "the multipart form must have one file field `image` and nothing else; it "
                f"has: {', '.join(field.name for field in fields) or 'nothing'}"
            )
        return fields[0].data
    if content_type.startswith("image/") or content_type in ("", "application/octet-stream"):
        return await request.body()
    raise UnsupportedFormat(
        f"Content-Type {content_type}: send the image as a raw body with Content-Type image/png "
        "(image/jpeg, ...) or as the multipart field `image`"
    )


async def images(
    request: Request, max_images: int, max_bytes: int
) -> AsyncGenerator[tuple[str, bytes]]:
    """(file name, bytes) of every multipart field `images`, or file of an archive, as they arrive;
    of a form's file beyond `max_bytes`, only one byte more, which is enough to refuse it.

    Raises InvalidForm, InvalidParameter, UnsupportedFormat, or what `archives.members` raises.
    """
    content_type = _content_type(request)
    if content_type in archives.CONTENT_TYPES:
        limits = archives.Limits(max_images, lambda name: max_bytes)
        async with aclosing(archives.members(request.stream(), limits)) as found:
            async for member in found:
                yield member
        return
    if content_type != FORM:
        raise UnsupportedFormat(
            f"Content-Type {content_type or '(none)'}: send multipart/form-data with one field "
            f"`images` for each file, or an archive as {archives.CONTENT_TYPES[0]} or application/"
            "x-tar"
        )
    number = 0
    async for part in parts(request, max_images, max_bytes + 1):
        if part.name != "images":
            raise InvalidParameter(f"unknown field {part.name!r}; the files go in `images`")
        if part.filename is None:
            raise InvalidParameter("a field `images` is text; send files (curl: images=@file)")
        yield part.filename or f"image {number}", part.data
        number += 1
    if not number:
        raise InvalidForm("the form has no file; send one field `images` for each")


def bundle(request: Request) -> AsyncIterator[bytes]:
    """The body, which is a zip; raises UnsupportedFormat where it says to be something else."""
    content_type = _content_type(request)
    if content_type not in ("application/zip", "application/x-zip-compressed"):
        raise UnsupportedFormat(
            f"Content-Type {content_type or '(none)'}: send the zipped bundle as a raw body with "
            "Content-Type application/zip"
        )
    return request.stream()


async def parts(
    request: Request, max_parts: int, max_part_bytes: int | None = None
) -> AsyncIterator[Part]:
    """The fields of a form, each as soon as it is whole; bytes beyond `max_part_bytes` are dropped.

    Raises InvalidForm for a form that is malformed, breaks off or has more fields.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    if not (boundary := options.get(b"boundary")):
        raise InvalidForm("the Content-Type has no boundary")
    try:
        reader = _FormReader(boundary, max_part_bytes)
    except FormParserError as error:
        raise InvalidForm(f"the form's boundary can't be used: {error}") from None
    count = 0
    async for chunk in request.stream():
        for part in reader.read(chunk):
            count += 1
            if count > max_parts:
                raise InvalidForm(f"the form has more than {max_parts} fields, which is the limit")
            yield part
    if not reader.ended:
        raise InvalidForm("the form breaks off before its last boundary")


@dataclass
class _Draft:
    """A part whose end has not come yet."""

    disposition: bytes = b""
    pieces: list[memoryview] = field(default_factory=list)
    size: int = 0


class _FormReader:
    def __init__(self, boundary: bytes, max_part_bytes: int | None) -> None:
        self._max_part_bytes = max_part_bytes
        self._header = self._value = b""
        self._draft = _Draft()
        self._whole: list[Part] = []
        self.ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_part_data": self._add_data,
                "on_part_end": self._end,
                "on_end": self._end_form,
            },
        )

    def read(self, chunk: bytes) -> list[Part]:
        """The parts that `chunk` completes."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidForm(f"the form is malformed: {error}") from None
        whole, self._whole = self._whole, []
        return whole

    def _begin(self) -> None:
        self._draft = _Draft()

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._draft.disposition = self._value
        self._header = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        draft = self._draft
        if self._max_part_bytes is not None:
            end = min(end, start + self._max_part_bytes - draft.size)
        if end > start:
            draft.pieces.append(memoryview(data)[start:end])  # no copy until the part is whole
            draft.size += end - start

    def _end(self) -> None:
        _, options = parse_options_header(self._draft.disposition)
        if b"name" not in options:
            raise InvalidForm("a field of the form has no name")
        filename = options.get(b"filename")
        self._whole.append(
            Part(
                options[b"name"].decode(errors="replace"),
                None if filename is None else filename.decode(errors="replace"),
                b"".join(self._draft.pieces),
            )
        )
        self._draft = _Draft()

    def _end_form(self) -> None:
        self.ended = True


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()

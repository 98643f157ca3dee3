"""Bodies in, encoded images out: whole, bounded, and one by one."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterable

import numpy as np
import pytest
from starlette.requests import Request

from service import uploads
from service.errors import InvalidForm, InvalidParameter, TooLarge, UnsupportedFormat

BOUNDARY = b"-edge"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
NOISE = np.random.default_rng(0).bytes(5000)


def request_of(chunks: Iterable[bytes], headers: dict[str, str]) -> Request:
    waiting = iter(chunks)

    async def receive() -> dict:
        chunk = next(waiting, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def field(data: bytes, name: str = "images", filename: str | None = "a.png") -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    head = f'Content-Disposition: form-data; name="{name}"{file}\r\nContent-Type: image/png\r\n'
    return b"--%s\r\n%s\r\n%s\r\n" % (BOUNDARY, head.encode(), data)


def form(*fields: bytes) -> bytes:
    return b"".join(fields) + b"--%s--\r\n" % BOUNDARY


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[i : i + size] for i in range(0, len(body), size)]


async def collected(found: AsyncIterator) -> list:
    return [item async for item in found]


def images_of(chunks: Iterable[bytes], limit: int = 9, max_bytes: int = 10**6) -> list:
    request = request_of(chunks, FORM)
    return asyncio.run(collected(uploads.images(request, limit, max_bytes)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 10**6])
@pytest.mark.parametrize(
    "data",
    [
        NOISE,
        b"",
        b"\r\n",
        b"\r\n--" + BOUNDARY[:-1],
        b"\r\n\r\n--\r\n" * 50,
        b"--" + BOUNDARY + b"x",
    ],
    ids=["noise", "empty", "line", "half a boundary", "lines", "the boundary within a line"],
)
def test_a_form_gives_its_files_byte_by_byte_however_it_is_cut(data: bytes, size: int) -> None:
    body = form(field(data), field(NOISE[::-1], filename="b.png"))

    assert images_of(cut(body, size)) == [("a.png", data), ("b.png", NOISE[::-1])]


def test_a_file_is_handed_on_while_the_rest_still_arrives() -> None:
    arrived = []

    # The first file's end is known once the second one's boundary is there.
    def whole() -> Iterable[bytes]:
        for number in range(3):
            arrived.append(number)
            yield field(NOISE, filename=f"{number}.png")
        yield form()

    async def first_of_three() -> str:
        async for name, _ in uploads.images(request_of(whole(), FORM), 9, 10**6):
            return str(name)
        raise AssertionError("no file came")

    assert asyncio.run(first_of_three()) == "0.png"
    assert arrived == [0, 1]


def test_of_a_file_beyond_the_limit_one_byte_more_is_kept() -> None:
    body = form(field(NOISE), field(b"small", filename="b.png"))

    found = images_of(cut(body, 700), max_bytes=1000)

    assert found == [("a.png", NOISE[:1001]), ("b.png", b"small")]


def test_a_nameless_file_is_numbered() -> None:
    assert [name for name, _ in images_of([form(field(b"x", filename=""))])] == ["image 0"]


def test_a_name_that_is_no_utf8_is_read_as_far_as_it_can_be() -> None:
    body = form(field(b"x", filename="part-\xff.png"))
    assert images_of([body.replace("\xff".encode(), b"\xff")])[0][0] == "part-\ufffd.png"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "breaks off"),
        (form(field(NOISE))[:-9], "breaks off"),
        (field(NOISE), "breaks off"),
        (b"no boundary", "malformed"),
        (b"--%s\r\nno header\r\n\r\nx" % BOUNDARY, "malformed"),
        (b"--%s\r\nX: y\r\n\r\nx\r\n--%s--\r\n" % (BOUNDARY, BOUNDARY), "no name"),
        (form(*[field(b"x")] * 10), "more than 9 fields"),
    ],
)
def test_a_form_that_can_not_be_read_is_refused_with_the_reason(body: bytes, words: str) -> None:
    with pytest.raises(InvalidForm, match=words):
        images_of(cut(body, 500))


def test_a_form_without_files_is_refused() -> None:
    with pytest.raises(InvalidForm, match="has no file"):
        images_of([form()])


def test_a_header_of_a_field_that_never_ends_is_refused_before_it_fills_the_memory() -> None:
    def chunks() -> Iterable[bytes]:
        yield b"--%s\r\nContent-Disposition: form-data; name=" % BOUNDARY
        for _ in range(1000):
            yield b"x" * 1000
            sent.append(1000)

    sent: list[int] = []
    with pytest.raises(InvalidForm, match="Maximum header size"):
        images_of(chunks())

    assert sum(sent) < 100_000


def test_a_form_without_a_boundary_is_refused() -> None:
    request = request_of([form(field(b"x"))], {"content-type": "multipart/form-data"})
    with pytest.raises(InvalidForm, match="no boundary"):
        asyncio.run(collected(uploads.images(request, 9, 10)))


def test_a_boundary_that_is_too_long_is_refused() -> None:
    headers = {"content-type": f"multipart/form-data; boundary={'x' * 300}"}
    with pytest.raises(InvalidForm, match="boundary can't be used"):
        asyncio.run(collected(uploads.images(request_of([b"x"], headers), 9, 10)))


def test_a_header_without_an_end_is_refused_before_it_fills_the_memory() -> None:
    body = b"--%s\r\nContent-Disposition: %s" % (BOUNDARY, b"x" * 1_000_000)
    with pytest.raises(InvalidForm, match="malformed"):
        images_of(cut(body, 65_536))


def test_fields_that_are_no_files_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="'note'"):
        images_of([form(field(b"x"), field(b"lot 17", "note", None))])
    with pytest.raises(InvalidParameter, match="`images` is text"):
        images_of([form(field(b"x", filename=None))])


def test_samples_in_a_raw_body_are_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="image/png"):
        asyncio.run(
            collected(uploads.images(request_of([b"x"], {"content-type": "image/png"}), 9, 10))
        )


@pytest.mark.parametrize("kind", ["raw", "form"])
def test_an_image_is_copied_once(kind: str) -> None:
    """What is allocated while a body is taken in is the image itself and little more."""
    image = np.random.default_rng(0).bytes(20_000_000)
    chunks = cut(form(field(image, "image")) if kind == "form" else image, 65_536)
    request = request_of(chunks, FORM if kind == "form" else {"content-type": "image/png"})

    async def peak() -> int:
        tracemalloc.start()
        try:
            assert await uploads.image(uploads.limited(request, 10**8)) == image
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert asyncio.run(peak()) < 1.1 * len(image)


@pytest.mark.parametrize("kind", ["raw", "form"])
def test_a_body_is_read_no_further_than_its_limit(kind: str) -> None:
    chunks = iter(cut(form(field(NOISE, "image")) if kind == "form" else NOISE, 100))
    request = request_of(chunks, FORM if kind == "form" else {"content-type": "image/png"})

    with pytest.raises(TooLarge, match="at least 1100 bytes; the limit is 1000"):
        asyncio.run(uploads.image(uploads.limited(request, 1000)))
    assert len(list(chunks)) > 30

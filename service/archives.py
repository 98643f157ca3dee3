"""Zip and tar files -> their members, read as a stream: nothing is written to disk, and of what is
unpacked one member is held at a time."""

import asyncio
import re
import tarfile
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import IO, Self, cast

from stream_unzip import NO_ENCRYPTION, TruncatedDataError, UnzipError, stream_unzip

from service import memory
from service.errors import InvalidArchive, TooLarge

CONTENT_TYPES = (
    "application/zip",
    "application/x-zip-compressed",
    "application/x-tar",
    "application/gzip",
    "application/x-gzip",
)
_MAX_HEADER_BYTES = 1 << 20  # of a tar's member, with its extensions
_PIECE_BYTES = 1 << 16
_MAX_LITTER_BYTES = 32 << 20
# What file managers leave beside the files.
_LITTER = re.compile(r"(^|/)(\.(?!\.?([/\\]|$))[^/]*|__MACOSX|Thumbs\.db|desktop\.ini)(/|$)")

Member = tuple[str, bytes]


@dataclass(frozen=True)
class Limits:
    members: int
    member_bytes: Callable[[str], int]  # by name; may raise to refuse it before it is unpacked


async def members(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncGenerator[Member]:
    """(name, bytes) of the files in a zip, tar or tar.gz, told by content.

    Folders, links and hidden files are left out; names are labels, nothing is written under them.
    Raises InvalidArchive where it is neither, damaged, encrypted or has more members, TooLarge as
    soon as a member passes its limit, and what `limits` raises.
    """
    loop = asyncio.get_running_loop()
    pending: Future[bytes] | None = None

    async def next_chunk() -> bytes:
        async for chunk in chunks:
            if chunk:
                return chunk
        return b""

    def pull() -> Iterator[bytes]:
        nonlocal pending
        while True:
            pending = asyncio.run_coroutine_threadsafe(next_chunk(), loop)
            if not (chunk := pending.result()):
                return
            yield chunk

    unpacking = _unpack(pull(), limits)
    thread = ThreadPoolExecutor(1, thread_name_prefix="archive")
    try:
        while (member := await loop.run_in_executor(thread, next, unpacking, None)) is not None:
            yield member
    finally:
        if pending is not None:
            pending.cancel()  # else the thread would wait for a body that nobody reads
        thread.submit(memory.trim)  # what the largest member took
        thread.shutdown(wait=False)


def _unpack(chunks: Iterator[bytes], limits: Limits) -> Iterator[Member]:
    first = next(chunks, b"")
    whole = chain([first], chunks)
    if first.startswith(b"PK"):
        files = _unzip(whole, limits)
    else:
        zipped = first.startswith(b"\x1f\x8b")
        files = _untar(_gunzip(whole) if zipped else whole, limits)
    count = 0
    for name, data in files:
        if _is_left_out(name):
            continue
        count += 1
        if count > limits.members:
            raise InvalidArchive(f"the archive has more than {limits.members} files, the limit")
        yield name, data


def _is_left_out(name: str) -> bool:
    return name.endswith("/") or _LITTER.search(name) is not None


def _limit(name: str, limits: Limits) -> int:
    return _MAX_LITTER_BYTES if _is_left_out(name) else limits.member_bytes(name)


def _unzip(chunks: Iterator[bytes], limits: Limits) -> Iterator[Member]:
    try:
        for raw_name, told, content in stream_unzip(
            chunks, allowed_encryption_mechanisms=(NO_ENCRYPTION,)
        ):
            name = raw_name.decode(errors="replace")
            limit = _limit(name, limits)
            if (told or 0) > limit:  # where a header says nothing, or a lie, it is counted below
                raise _too_large(name, limit)
            yield name, _whole(name, content, limit)
    except UnzipError as error:
        raise InvalidArchive(f"the zip can't be read: {_told(error)}") from error


def _whole(name: str, pieces: Iterable[bytes], limit: int) -> bytes:
    # A single buffer would be copied as it grows; pieces may be of a few bytes.
    held, last, size = list[bytes](), bytearray(), 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            held.clear()  # whoever holds the refusal holds this frame
            raise _too_large(name, limit)
        last += piece
        if len(last) >= _PIECE_BYTES:
            held.append(bytes(last))
            last.clear()
    return b"".join([*held, last])


def _untar(chunks: Iterator[bytes], limits: Limits) -> Iterator[Member]:
    stream = _Stream(chunks)
    try:
        with tarfile.open(mode="r|", fileobj=cast(IO[bytes], stream), tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                if member.isreg():
                    if member.size > (limit := _limit(member.name, limits)):
                        raise _too_large(member.name, limit)
                    stream.allow(member.size)
                    content = archive.extractfile(member)
                    assert content is not None  # of a regular file there is
                    yield member.name, content.read()
                stream.allow(0)
                archive.members = []  # type: ignore[attr-defined]  # for random access, which a stream doesn't have
    except (tarfile.TarError, zlib.error, EOFError, ValueError, RecursionError) as error:
        raise InvalidArchive(f"neither a zip nor a tar that can be read: {_told(error)}") from error


class _Header(tarfile.TarInfo):
    """One that is damaged ends the archive with an error, not as if nothing more came."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise InvalidArchive(
                f"neither a zip nor a tar that can be read: a header is damaged: {error}"
            ) from error


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """In small pieces, however little there is to unpack them from."""
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    for chunk in chunks:
        while chunk:
            if piece := unpacker.decompress(chunk, _PIECE_BYTES):
                yield piece
            chunk = unpacker.unconsumed_tail
            if unpacker.eof and (chunk := unpacker.unused_data):  # another one follows
                unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    if not unpacker.eof:
        raise EOFError("the gzip breaks off")


class _Stream:
    """Chunks as the file that tarfile reads from; what it may read before the next file is bounded,
    since it would hold the whole of a header, however large that says it is."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""
        self.allow(0)

    def allow(self, size: int) -> None:
        """A file of so many bytes and the header after it."""
        self._allowed = size + _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        pieces, found = [self._rest], len(self._rest)
        while found < size and (chunk := next(self._chunks, b"")):
            pieces.append(chunk)
            found += len(chunk)
        whole = b"".join(pieces)
        piece, self._rest = whole[:size], whole[size:]
        self._allowed -= len(piece)
        if self._allowed < 0:
            raise InvalidArchive(f"the tar has a header of more than {_MAX_HEADER_BYTES} bytes")
        return piece


def _too_large(name: str, limit: int) -> TooLarge:
    return TooLarge(f"{name} in the archive has more than {limit} bytes, the limit of a file")


def _told(error: Exception) -> str:
    if isinstance(error, TruncatedDataError):
        return "it ends too early; send all of it"
    return str(error) or type(error).__name__

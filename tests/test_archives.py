"""Zips and tars, unpacked while they arrive; a hostile or damaged one ends with a reason."""

import asyncio
import bz2
import gzip
import io
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from service.archives import Limits, members
from service.errors import InvalidArchive, TooLarge

FILES = {"a.png": b"first", "folder/b.png": b"second" * 10_000, "empty.png": b""}
LIMITS = Limits(members=100, member_bytes=lambda name: 1 << 20)


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


PACKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zipped,
    "stored zip": lambda files: zipped(files, zipfile.ZIP_STORED),
    "tar": tarred,
    "tar.gz": lambda files: tarred(files, "w:gz"),
}


async def chunked(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
    yield b""


def unpacked(data: bytes, limits: Limits = LIMITS, size: int = 1000) -> list[tuple[str, bytes]]:
    async def collect() -> list[tuple[str, bytes]]:
        return [member async for member in members(chunked(data, size), limits)]

    return asyncio.run(collect())


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("size", [7, 1000, 10**6])
def test_every_file_comes_out_whole_and_in_order(kind: str, size: int) -> None:
    assert unpacked(PACKERS[kind](FILES), size=size) == list(FILES.items())


def test_a_zip_that_was_written_to_a_pipe_is_read() -> None:
    """Its sizes come after the data."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, data in FILES.items():
            archive.writestr(name, data)

    assert unpacked(bytes(pipe.data)) == list(FILES.items())


def test_a_gzip_in_several_parts_is_one_tar() -> None:
    data = tarred(FILES)

    assert unpacked(gzip.compress(data[:700]) + gzip.compress(data[700:])) == list(FILES.items())


@pytest.mark.parametrize("kind", PACKERS)
def test_folders_and_what_file_managers_leave_behind_are_left_out(kind: str) -> None:
    litter = {"__MACOSX/._a.png": b"x", ".DS_Store": b"x", "folder/.hidden/a.png": b"x"}

    assert unpacked(PACKERS[kind](litter | {"a.png": b"part"})) == [("a.png", b"part")]


def test_links_and_devices_of_a_tar_are_left_out() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("there")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)

    assert unpacked(buffer.getvalue()) == []


def test_names_are_labels_and_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    files = {"../../up.png": b"x", "./here.png": b"x", "/root.png": b"x"}

    assert unpacked(tarred(files)) == list(files.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", PACKERS)
def test_a_file_beyond_the_limit_ends_it_by_name(kind: str) -> None:
    data = PACKERS[kind]({"a.png": b"x", "big.png": bytes(2000)})

    with pytest.raises(TooLarge, match=r"big.png .* more than 1999 bytes"):
        unpacked(data, Limits(100, lambda name: 1999))
    assert len(unpacked(data, Limits(100, lambda name: 2000))) == 2


@pytest.mark.parametrize("kind", PACKERS)
def test_more_files_than_the_limit_end_it(kind: str) -> None:
    data = PACKERS[kind]({f"{i}.png": b"x" for i in range(4)})

    with pytest.raises(InvalidArchive, match="more than 3 files"):
        unpacked(data, Limits(3, lambda name: 1000))
    assert len(unpacked(data, Limits(4, lambda name: 1000))) == 4


@pytest.mark.parametrize("kind", PACKERS)
def test_an_archive_that_breaks_off_or_is_damaged_is_refused(kind: str) -> None:
    data = PACKERS[kind](FILES)
    with pytest.raises(InvalidArchive):
        unpacked(data[: len(data) // 3])
    flipped = bytearray(data)
    flipped[20] ^= 0xFF  # in the first header, or in the first packed block
    with pytest.raises(InvalidArchive):
        unpacked(bytes(flipped))


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_tar_that_is_damaged_after_its_first_file_is_no_shorter_one(kind: str) -> None:
    files = {f"{i}.png": b"x" for i in range(5)}
    pack = gzip.compress if kind == "tar.gz" else bytes
    whole = tarred(files)
    flipped = bytearray(whole)
    flipped[1024 + 20] ^= 1  # in the second header
    assert len(unpacked(pack(whole))) == 5

    for data in (bytes(flipped), whole[:2048], whole[: 2048 + 300]):
        with pytest.raises(InvalidArchive, match="damaged"):
            unpacked(pack(data))


def hostile_tars() -> list[bytes]:
    sparse = tarfile.TarInfo("sparse.png")
    sparse.pax_headers = {"GNU.sparse.map": "a,b", "GNU.sparse.size": "x"}
    chained = tarfile.TarInfo("chained")
    chained.type = tarfile.XHDTYPE
    end = bytes(1024)
    return [sparse.tobuf(tarfile.PAX_FORMAT) + end, chained.tobuf() * 1500 + end]


@pytest.mark.parametrize("number", range(2), ids=["sparse", "headers without end"])
def test_what_the_tar_reader_stumbles_over_is_refused(number: int) -> None:
    with pytest.raises(InvalidArchive):
        unpacked(hostile_tars()[number])


@pytest.mark.parametrize("data", [b"", b"no archive", bytes(20), b"PK", b"\x1f\x8b", b"PK" * 500])
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArchive, match="can't be read|can be read|breaks off|damaged"):
        unpacked(data)


def test_an_encrypted_zip_is_refused() -> None:
    data = bytearray(zipped({"a.png": b"secret"}, zipfile.ZIP_STORED))
    data[6] |= 1  # the flag of its local header

    with pytest.raises(InvalidArchive, match="zip"):
        unpacked(bytes(data))


ZEROS = bytes(100 << 20)


def tar_with_a_long_header() -> bytes:
    """Its extended header says that it has 100 MB."""
    header = tarfile.TarInfo("bomb")
    header.type, header.size = tarfile.XHDTYPE, len(ZEROS)
    return header.tobuf() + ZEROS


BOMBS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: zipped({"bomb.png": ZEROS}),
    "tar.gz": lambda: tarred({"bomb.png": ZEROS}, "w:gz"),
    "header of a tar": lambda: gzip.compress(tar_with_a_long_header()),
    # A few bytes of it unpack into gigabytes at once; it is no tar here.
    "bzip2": lambda: bz2.compress(tarred({"bomb.png": ZEROS})),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_unpacked(kind: str) -> None:
    data = BOMBS[kind]()
    assert len(data) < 1 << 20
    tracemalloc.start()

    with pytest.raises((TooLarge, InvalidArchive)):
        unpacked(data, size=65536)

    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_name_that_is_refused_is_not_unpacked(kind: str) -> None:
    def refuse(name: str) -> int:
        raise TooLarge(f"no {name}")

    data = BOMBS[kind]()
    tracemalloc.start()

    with pytest.raises(TooLarge, match=r"^no bomb\.png$"):
        unpacked(data, Limits(100, refuse), size=65536)

    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_what_file_managers_leave_behind_needs_no_leave_and_has_a_limit_too() -> None:
    litter = {"__MACOSX/._a.png": b"x" * 5000, "a.png": b"first"}
    only = Limits(100, {"a.png": 10}.__getitem__)

    assert unpacked(zipped(litter), only) == unpacked(tarred(litter), only) == [("a.png", b"first")]
    with pytest.raises(TooLarge):
        unpacked(zipped({".hidden": bytes(40 << 20)}), only, size=65536)


def test_a_size_that_lies_is_no_way_around_the_limit() -> None:
    """A local header that says 10 bytes over data that unpacks to 10 MB."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(bytes(10 << 20)) + packer.flush()
    header = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(packed), 10, 5, 0)

    with pytest.raises((InvalidArchive, TooLarge)):
        unpacked(header + b"a.png" + packed)


def test_giving_up_halfway_leaves_no_thread_waiting_for_the_rest() -> None:
    """The sender stops sending; whoever reads gives up."""
    data = zipped(FILES)

    async def stalled() -> AsyncIterator[bytes]:
        yield data[:40]
        await asyncio.sleep(3600)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), aclosing(members(stalled(), LIMITS)) as found:
                async for _ in found:
                    pass

    asyncio.run(run())  # which waits for threads of its own
    deadline = 100
    while any(thread.name.startswith("archive") for thread in threading.enumerate()) and deadline:
        deadline -= 1
        threading.Event().wait(0.1)
    assert deadline

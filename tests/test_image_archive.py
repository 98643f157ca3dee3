"""Images that are kept: which, how they lie on the disk, and that the folder keeps its limits."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, picture
from test_serve import wait_for

from service import image_archive
from service.errors import ImageNotKept, SettingsError
from service.image import digest
from service.image_archive import ImageArchive, Taken
from service.metrics import Metrics
from service.settings import Settings

PNG = encoded(picture())


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def open_archive(tmp_path: Path, metrics: Metrics) -> Iterator[Callable[..., ImageArchive]]:
    """Archives in `tmp_path/images`; started where nothing else is said."""
    opened: list[ImageArchive] = []

    def open(start: bool = True, **settings: object) -> ImageArchive:
        told = {"archive": "all", "archive_folder": tmp_path / "images"} | settings
        opened.append(ImageArchive(Settings(**told), metrics))  # type: ignore[arg-type]
        if start:
            opened[-1].start()
        return opened[-1]

    yield open
    for archive in opened:
        archive.close()


def offer(archive: ImageArchive, data: bytes, decision: str = "normal") -> Taken | None:
    return archive.offer(data, digest(data), decision)  # type: ignore[arg-type]


def different(count: int) -> list[bytes]:
    """PNGs of noise, which can't be made smaller: a bit more than 18 KB each."""
    rng = np.random.default_rng(0)
    return [encoded(rng.integers(0, 256, (64, 96, 3), np.uint8)) for _ in range(count)]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def kept(archive: ImageArchive, tmp_path: Path) -> Path:
    """The file of a picture that was given to the archive, which is closed."""
    with closing(archive):
        offer(archive, PNG)
    (path,) = files(tmp_path / "images")
    return path


def dropped(metrics: Metrics, reason: str) -> float:
    value = metrics.registry.get_sample_value("skrd4ad_archive_dropped_total", {"reason": reason})
    assert value is not None
    return value


# What is kept


@pytest.mark.parametrize(
    ("format", "suffix", "media_type"),
    [
        ("PNG", "png", "image/png"),
        ("JPEG", "jpg", "image/jpeg"),
        ("BMP", "bmp", "image/bmp"),
        ("TIFF", "tif", "image/tiff"),
        ("WEBP", "webp", "image/webp"),
        ("MPO", "jpg", "image/jpeg"),
    ],
)
def test_an_image_comes_back_byte_by_byte_with_the_type_of_its_content(
    open_archive: Callable[..., ImageArchive],
    tmp_path: Path,
    format: str,
    suffix: str,
    media_type: str,
) -> None:
    data = encoded(picture(), format)
    with closing(open_archive()) as archive:
        assert offer(archive, data) is not None

    assert archive.read(digest(data)) == (data, media_type)
    name = digest(data)
    assert files(tmp_path / "images") == [tmp_path / "images" / name[:2] / f"{name}.{suffix}"]


@pytest.mark.parametrize(("kind", "kept"), [("none", 0), ("anomalous", 1), ("all", 2)])
def test_the_decision_chooses_what_is_kept(
    open_archive: Callable[..., ImageArchive], tmp_path: Path, kind: str, kept: int
) -> None:
    normal, anomalous = different(2)
    with closing(open_archive(archive=kind)) as archive:
        taken = [offer(archive, normal), offer(archive, anomalous, "anomalous")]

    assert sum(each is not None for each in taken) == kept
    assert len(files(tmp_path / "images")) == kept


def test_without_an_archive_no_folder_is_made(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    open_archive(archive="none").close()

    assert not (tmp_path / "images").exists()


def test_a_sample_is_of_the_asked_share_and_the_same_everywhere(
    open_archive: Callable[..., ImageArchive],
) -> None:
    archive = open_archive(start=False, archive="sampled", archive_share=0.25)
    names = [digest(str(number).encode()) for number in range(4000)]

    chosen = [archive._wants(name, "normal") for name in names]

    assert 0.22 < sum(chosen) / len(chosen) < 0.28
    assert [archive._wants(name, "anomalous") for name in names] == chosen


def test_the_same_image_is_kept_once(
    open_archive: Callable[..., ImageArchive], tmp_path: Path, metrics: Metrics
) -> None:
    with closing(open_archive()) as archive:
        taken = [offer(archive, PNG) for _ in range(3)]

    assert all(each is not None and not each.failed for each in taken)
    assert len(files(tmp_path / "images")) == 1
    assert metrics.registry.get_sample_value("skrd4ad_archive_written_total") == 1


def test_an_image_that_is_not_there_any_more_is_told_with_the_limits(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    archive = open_archive()
    kept(archive, tmp_path).unlink()

    with pytest.raises(ImageNotKept, match="any more.* or 90 days is removed"):
        archive.read(digest(PNG))


def test_a_file_that_a_power_cut_left_in_pieces_is_not_handed_out(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    archive = open_archive()
    kept(archive, tmp_path).write_bytes(PNG[:-10])

    with pytest.raises(ImageNotKept, match="is damaged"):
        archive.read(digest(PNG))


def test_a_file_that_can_not_be_read_is_told_with_the_reason(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    archive = open_archive()
    path = kept(archive, tmp_path)
    path.unlink()
    path.mkdir()

    with pytest.raises(ImageNotKept, match="can't be read: .*directory"):
        archive.read(digest(PNG))


# Off the request path


def test_what_is_queued_is_written_when_the_service_stops(
    open_archive: Callable[..., ImageArchive], tmp_path: Path, metrics: Metrics
) -> None:
    archive = open_archive()
    for data in different(50):
        offer(archive, data)

    archive.close()

    assert len(files(tmp_path / "images")) == 50
    assert metrics.registry.get_sample_value("skrd4ad_archive_pending_bytes") == 0


def test_too_much_that_waits_is_left_out_and_counted(
    open_archive: Callable[..., ImageArchive], metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_archive, "PENDING_BYTES", 60_000)
    archive = open_archive(start=False)

    taken = [offer(archive, data) is not None for data in different(5)]

    assert taken == [True, True, True, False, False]
    assert dropped(metrics, "queue") == 2
    assert metrics.registry.get_sample_value("skrd4ad_archive_pending_bytes") < 60_000


def test_an_image_larger_than_all_that_may_wait_still_gets_its_turn(
    open_archive: Callable[..., ImageArchive], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_archive, "PENDING_BYTES", 10)

    assert offer(open_archive(start=False), PNG) is not None


def test_a_folder_that_fails_is_told_and_the_next_image_is_kept(
    open_archive: Callable[..., ImageArchive],
    tmp_path: Path,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    archive = open_archive()
    blocked = tmp_path / "images" / digest(PNG)[:2]
    blocked.write_text("no folder")

    taken = offer(archive, PNG)
    assert taken is not None
    wait_for(lambda: taken.failed, "it didn't fail")
    blocked.unlink()
    again = offer(archive, PNG)
    archive.close()

    assert again is not None and not again.failed
    assert archive.read(digest(PNG))[0] == PNG
    assert dropped(metrics, "failed") == 1
    assert caplog.text.count("images can't be archived") == 1
    assert "images are archived again" in caplog.text


def test_images_that_a_slow_disk_left_in_the_queue_are_told_as_not_archived(
    open_archive: Callable[..., ImageArchive],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(image_archive, "CLOSE_S", 0.1)
    stuck, goes_on = threading.Event(), threading.Event()

    def write_slowly(path: Path, data: bytes) -> None:
        stuck.set()
        goes_on.wait(60)

    monkeypatch.setattr(image_archive, "_write_whole", write_slowly)
    archive = open_archive()
    taken = [offer(archive, data) for data in different(3)]
    stuck.wait(60)

    archive.close()
    goes_on.set()

    assert [each.failed for each in taken if each] == [False, True, True]
    assert "2 images are not archived" in caplog.text


# Limits


def aged(folder: Path, data: bytes, days: float) -> None:
    """As if the image had been inspected so many days ago."""
    (path,) = folder.glob(f"*/{digest(data)}.*")
    seen = time.time() - days * 86400
    os.utime(path, (seen, seen))


def test_the_oldest_leave_before_there_is_too_much(
    open_archive: Callable[..., ImageArchive], tmp_path: Path, metrics: Metrics
) -> None:
    images = different(10)
    with closing(open_archive()) as archive:
        for data in images:
            offer(archive, data)
    for days, data in enumerate(reversed(images)):
        aged(tmp_path / "images", data, days)
    size = sum(map(len, images))

    open_archive(start=False, archive_max_bytes=size - 1).sweep()

    kept = sum(path.stat().st_size for path in files(tmp_path / "images"))
    assert 0.75 * size < kept <= 0.9 * size
    with pytest.raises(ImageNotKept):
        archive.read(digest(images[0]))
    assert archive.read(digest(images[-1]))[0] == images[-1]


def test_the_folder_is_never_larger_than_it_may_be(
    open_archive: Callable[..., ImageArchive], tmp_path: Path, metrics: Metrics
) -> None:
    images = different(100)
    limit = 20 * len(images[0])
    archive = open_archive(archive_max_bytes=limit)
    sizes: list[int] = []

    for data in images:
        offer(archive, data)
        sizes.append(sum(sizes_there(tmp_path / "images")))
    archive.close()

    assert max(sizes) <= limit
    written = metrics.registry.get_sample_value("skrd4ad_archive_written_total")
    assert written is not None and written + dropped(metrics, "full") == len(images)
    assert written >= 19


def sizes_there(folder: Path) -> Iterator[int]:
    """Of files, while another thread removes some."""
    for path in files(folder):
        with suppress(FileNotFoundError):
            yield path.stat().st_size


def test_images_not_seen_for_too_long_leave_and_those_seen_again_stay(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    images = different(3)
    with closing(open_archive()) as archive:
        for data in images:
            offer(archive, data)
    for data in images:
        aged(tmp_path / "images", data, 91)
    with closing(open_archive(archive_max_age_days=0)) as archive:  # 0: none is too old
        offer(archive, images[1])
    assert len(files(tmp_path / "images")) == 3

    open_archive(start=False).sweep()

    assert [path.stem for path in files(tmp_path / "images")] == [digest(images[1])]


def test_what_a_crash_left_half_written_goes_and_foreign_files_stay(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    folder = tmp_path / "images" / "ab"
    folder.mkdir(parents=True)
    old, young = (folder / f".{'ab' * 32}.{number:08x}" for number in range(2))
    foreign = folder / "notes.txt"
    for path in (old, young, foreign):
        path.write_text("half")
    for path in (old, foreign):
        os.utime(path, (0, 0))

    open_archive(start=False).sweep()

    assert files(tmp_path / "images") == sorted([young, foreign])


def test_a_folder_that_cannot_be_written_to_stops_the_start(
    open_archive: Callable[..., ImageArchive], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(SettingsError, match="archive_folder .*file/images: Not a directory"):
        open_archive(archive_folder=tmp_path / "file" / "images")

"""Bundles that are sent: what is taken, and that nothing else ever leaves a trace."""

import io
import json
import math
import os
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    SlowDisk,
    brightness_graph,
    bundle_files,
    encoded,
    golden_of,
    inspect,
    picture,
    upload,
    zipped,
)
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_external_data import leaking

from service.app import create_app
from service.bundle import Bundle
from service.detector import Detector
from service.errors import InferenceFailed
from service.image import digest
from service.settings import Settings

Write = Callable[..., Bundle]
HALF = brightness_graph(gain=0.5)


def found_in(models: Path) -> list[str]:
    """Everything below the models folder."""
    return sorted(str(path.relative_to(models)) for path in models.rglob("*"))


BEFORE = ["part", "part/1", "part/1/manifest.json", "part/1/model.onnx"]


@pytest.fixture
def untouched(client: TestClient, settings: Settings) -> Iterator[TestClient]:
    """The app with version 1 of `part`, which serves afterwards as before, alone."""
    yield client
    assert found_in(settings.models) == BEFORE
    answer = inspect(client, encoded(picture())).json()
    assert answer["model"] == {"name": "part", "version": 1, "digest": digest(brightness_graph())}
    assert [each["version"] for each in client.get("/v1/models").json()] == [1]


def test_an_uploaded_version_is_there_and_another_one_serves_on(
    client: TestClient, settings: Settings
) -> None:
    golden = golden_of(0.4, 51 / 255)

    response = upload(client, zipped(bundle_files(HALF, golden, version=2)), digest=digest(HALF))

    assert response.status_code == 201
    made = response.json()
    assert (made["name"], made["version"], made["versions"]) == ("part", 2, [1, 2])
    assert (made["active"], made["loaded"], made["golden"]) == (False, True, True)
    assert Bundle(settings.models / "part" / "2").read_graph() == HALF
    assert Bundle(settings.models / "part" / "2").read_golden() == golden[1]
    assert inspect(client, encoded(picture())).json()["model"]["version"] == 1
    assert inspect(client, encoded(picture()), version=2).json()["model"]["version"] == 2
    assert not [path for path in found_in(settings.models) if "partial" in path]


def test_an_upload_never_changes_what_serves_not_even_by_a_restart(
    client: TestClient, settings: Settings
) -> None:
    upload(client, zipped(bundle_files(HALF, version=2)))

    with TestClient(create_app(settings)) as again:
        assert inspect(again, encoded(picture())).json()["model"]["version"] == 1


def test_an_upload_can_be_activated_at_once(client: TestClient) -> None:
    response = upload(client, zipped(bundle_files(HALF, version=2)), activate="true")

    assert response.json()["active"] is True
    assert inspect(client, encoded(picture())).json()["model"]["version"] == 2


def test_a_folder_around_the_files_and_what_file_managers_leave_are_taken(
    client: TestClient,
) -> None:
    files = {f"part-2/{name}": data for name, data in bundle_files(HALF, version=2).items()}
    litter = {"__MACOSX/part-2/._model.onnx": b"1", "part-2/.DS_Store": b"2"}

    assert upload(client, zipped(files | litter)).status_code == 201


def test_the_first_version_of_a_new_model_serves_when_it_is_named(client: TestClient) -> None:
    assert upload(client, zipped(bundle_files(HALF, name="gear", version=4))).status_code == 201

    answer = inspect(client, encoded(picture()), model="gear").json()
    assert (answer["model"]["name"], answer["model"]["version"]) == ("gear", 4)


def test_a_service_without_models_gets_its_first_one(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        assert upload(client, zipped(bundle_files())).status_code == 201

        assert inspect(client, encoded(picture())).json()["model"]["version"] == 1
        assert client.get("/readyz").status_code == 200


# Refused, and nothing stays


def test_a_version_is_never_overwritten(untouched: TestClient) -> None:
    response = upload(untouched, zipped(bundle_files(HALF, version=1)))

    assert_problem(response, 409, "part version 1 exists")


def test_another_digest_than_was_insisted_on_is_409_with_both(untouched: TestClient) -> None:
    response = upload(untouched, zipped(bundle_files(HALF, version=2)), digest="f" * 64)

    assert_problem(response, 409, digest(HALF), "f" * 64)


def changed(**files: bytes | None) -> bytes:
    """A good version 2 with files replaced, or left out."""
    good = bundle_files(HALF, golden_of(0.4, 51 / 255), version=2)
    new = {name.replace("_", "."): data for name, data in files.items()}
    return zipped({name: data for name, data in (good | new).items() if data is not None})


def with_manifest(**fields: object) -> bytes:
    files = bundle_files(HALF, version=2)
    manifest = json.loads(files["manifest.json"]) | fields
    return zipped(files | {"manifest.json": json.dumps(manifest).encode()})


def with_golden(score: float) -> bytes:
    return zipped(bundle_files(HALF, golden_of(0.4, score), version=2))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed(model_onnx=brightness_graph()), "model.onnx: SHA-256 is"),
        (changed(golden_png=encoded(picture(0.3))), "golden.png: SHA-256 is"),
        (changed(model_onnx=None), "no model.onnx, but manifest.json, golden.png"),
        (changed(manifest_json=None), "no manifest.json"),
        (changed(golden_png=None), "golden.png is missing"),
        (changed(manifest_json=b"{"), "the file: Invalid JSON"),
        (with_manifest(name="../part"), "name: String should match"),
        (with_manifest(version=0), "version: "),
        (with_manifest(image_size=[250, 96]), "image_size"),
        (with_manifest(surprise=1), "surprise"),
        (zipped(bundle_files(b"no graph", version=2)), "can't load the graph"),
        (zipped(bundle_files(brightness_graph((32, 32)), version=2)), "(N, 64, 96, 3)"),
        (zipped(bundle_files(brightness_graph(output="heat"), version=2)), "outputs must be"),
        (zipped(bundle_files(leaking("manifest.json"), version=2)), "is in another file"),
        (zipped(bundle_files(brightness_graph(gain=math.nan), version=2)), "is no number"),
        (zipped(bundle_files(brightness_graph(fragile=True, zeros=9), version=2)), "out of data"),
        (with_golden(0.4), "the bundle: the self-check failed: golden.png scores 0.2"),
        (changed(notes_txt=b"more"), "'notes.txt' in the zip: only"),
        (zipped(bundle_files(version=2) | {"golden.png": b"?"}), "golden.png is there"),
        (zipped({}), "can't be read|no manifest.json"),
    ],
)
def test_a_bundle_that_can_not_be_used_is_refused_with_the_reason(
    untouched: TestClient, data: bytes, says: str
) -> None:
    response = upload(untouched, data)

    assert response.status_code in (400, 422)
    problem = assert_problem(response, response.status_code)
    assert any(each in problem["detail"] for each in says.split("|")), problem["detail"]


def test_a_bundle_for_which_there_is_no_room_now_is_503_and_may_be_sent_again(
    untouched: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Detector, images: object, *, aside: bool = False) -> None:
        raise InferenceFailed("CUDA failure 2: out of memory")

    with monkeypatch.context() as crowded:
        crowded.setattr(Detector, "run", fail)
        response = upload(untouched, zipped(bundle_files(HALF, version=2)))

    assert_problem(response, 503, "out of memory")
    assert int(response.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "../../part/1/model.onnx",
        "/model.onnx",
        "/tmp/model.onnx",
        "a/b/model.onnx",
        "a/../model.onnx",
        "..\\model.onnx",
        "C:\\model.onnx",
        "./model.onnx",
        "model.onnx/../manifest.json",
    ],
)
def test_names_that_lead_elsewhere_are_refused(untouched: TestClient, name: str) -> None:
    files = bundle_files(HALF, version=2)
    files[name] = files.pop("model.onnx")

    assert_problem(upload(untouched, zipped(files)), 422, repr(name), "only")


def test_two_bundles_at_once_are_refused(untouched: TestClient) -> None:
    files = bundle_files(HALF, version=2)
    both = {f"{folder}/{name}": data for folder in "ab" for name, data in files.items()}

    assert_problem(upload(untouched, zipped(both)), 422, "one bundle at a time")


def test_a_zip_that_breaks_off_or_is_none_is_400(untouched: TestClient) -> None:
    whole = zipped(bundle_files(HALF, version=2))

    assert_problem(upload(untouched, whole[:-2000]), 400, "the zip can't be read")
    assert_problem(upload(untouched, b"no zip"), 400, "neither a zip")


def test_a_body_of_another_type_is_415(untouched: TestClient) -> None:
    response = untouched.post("/v1/models", content=b"x", headers={"Content-Type": "image/png"})

    assert_problem(response, 415, "image/png", "application/zip")


@pytest.fixture
def small(settings: Settings, write_bundle: Write) -> Iterator[TestClient]:
    """The app that takes bundles of up to 100 kB."""
    write_bundle()
    limited = settings.model_copy(update={"max_bundle_bytes": 100_000})
    with TestClient(create_app(limited)) as client:
        yield client
    assert found_in(settings.models) == BEFORE


def bomb() -> bytes:
    """50 MB of nothing in 50 kB, under the name of the graph."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", bytes(50_000_000))
    return buffer.getvalue()


def test_a_bundle_beyond_the_limit_is_413_packed_or_not(small: TestClient) -> None:
    files = bundle_files(version=2)
    noise = {name: os.urandom(70_000) for name in ("model.onnx", "golden.png")}

    assert_problem(upload(small, zipped({"model.onnx": os.urandom(101_000)})), 413, "100000")
    assert_problem(upload(small, bomb()), 413, "model.onnx", "100000 bytes")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in noise:
            archive.writestr(name, bytes(70_000))
    assert_problem(upload(small, packed.getvalue()), 413, "140000 bytes; the limit is 100000")
    assert upload(small, zipped(files | noise)).status_code == 413


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("a.png", 422, "'a.png' in the zip: only"),
        ("manifest.json", 413, "67108864 bytes"),
        ("golden.png", 413, "67108864 bytes"),
    ],
)
def test_what_can_be_no_part_of_a_bundle_is_not_unpacked_to_see(
    untouched: TestClient, name: str, status: int, says: str
) -> None:
    data = zipped({name: bytes(200_000_000)})
    tracemalloc.start()

    response = upload(untouched, data)

    assert_problem(response, status, says)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_zip_that_lies_about_its_sizes_is_refused(untouched: TestClient) -> None:
    data = zipped(bundle_files(HALF, version=2))
    size = struct.pack("<I", len(HALF))
    assert size in data

    assert upload(untouched, data.replace(size, struct.pack("<I", 17), 2)).status_code == 400


def test_a_models_folder_that_can_not_be_written_to_is_409_and_says_what_to_do(
    untouched: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs this may be root
    response = upload(untouched, zipped(bundle_files(HALF, version=2)))

    assert_problem(response, 409, "models", "read-only", "mount the models folder writable")


def test_a_place_that_can_not_be_written_to_is_409_with_the_reason(
    client: TestClient, settings: Settings
) -> None:
    (settings.models / "gear").write_text("a file where the model's folder would be")

    response = upload(client, zipped(bundle_files(HALF, name="gear")))

    assert_problem(response, 409, "gear", "mount the models folder writable")


def test_bundles_are_taken_one_at_a_time(client: TestClient, write_bundle: Write) -> None:
    """The first waits for a load that is under way."""
    slow = SlowDisk(write_bundle(version=9))
    threading.Thread(target=lambda: client.post("/v1/models/part/versions/9/load")).start()
    slow.wait_for_reader()
    statuses: list[int] = []

    def send(version: int) -> None:
        answer = upload(client, zipped(bundle_files(HALF, version=version)))
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            assert_problem(answer, 429, "one at a time")
            slow.let_go()

    threads = [threading.Thread(target=send, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(statuses) == [201, 429]

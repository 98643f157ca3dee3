"""The REST API: every answer and every refusal, through the real app and the real runtime."""

import asyncio
import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    SIZE,
    brightness_graph,
    calibrate,
    encoded,
    inspect,
    normal_pictures,
    picture,
    spotted,
)
from fastapi.testclient import TestClient
from PIL import Image

from service import image
from service.app import create_app
from service.bundle import Bundle
from service.errors import BundleError
from service.image import digest
from service.settings import Settings

Write = Callable[..., Bundle]


def assert_problem(response, status: int, *fragments: str) -> dict:
    """RFC 9457 with our fields; the detail holds every fragment."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:skrd4ad:problem:")
    assert problem["title"]
    assert problem["request_id"] == response.headers["x-request-id"]
    for fragment in fragments:
        assert fragment in problem["detail"]
    return problem


# inspect: answers


def test_a_spotted_image_is_anomalous_with_its_place(client: TestClient) -> None:
    data = encoded(spotted(0.8))

    answer = inspect(client, data).json()

    assert answer["decision"] == "anomalous"
    assert answer["score"] == pytest.approx(204 / 255)
    assert answer["threshold"] == pytest.approx(0.3, rel=1e-4)
    assert answer["threshold_source"] == "bundle"
    assert answer["p_value"] == pytest.approx(1 / 100)
    assert answer["calibration"] == {
        "id": "bundle",
        "profile": None,
        "target_fpr": 0.01,
        "confidence": None,
        "samples": 99,
    }
    assert answer["image"] == {"width": 96, "height": 64, "sha256": digest(data)}
    (region,) = answer["regions"]
    assert [region[k] for k in ("x", "y", "width", "height", "area")] == [30, 20, 20, 10, 200]
    assert set(answer["timing_ms"]) == {"decode", "queue", "infer", "render", "total"}


def test_a_dark_image_is_normal_without_regions(client: TestClient) -> None:
    answer = inspect(client, encoded(picture(0.1))).json()

    assert answer["decision"] == "normal"
    assert answer["regions"] == []
    assert answer["p_value"] > 0.9


def test_regions_are_in_the_original_images_pixels(client: TestClient) -> None:
    large = np.kron(spotted(0.8), np.ones((4, 4, 1), np.uint8))

    (region,) = inspect(client, encoded(large)).json()["regions"]

    assert region["x"] == pytest.approx(120, abs=4)
    assert region["y"] == pytest.approx(80, abs=4)
    assert region["area"] == pytest.approx(3200, rel=0.2)


def test_multipart_and_raw_bodies_give_the_same_answer(client: TestClient) -> None:
    data = encoded(spotted())

    raw = inspect(client, data).json()
    form = client.post("/v1/inspect", files={"image": ("part.png", data, "image/png")}).json()

    volatile = {"id", "request_id", "timing_ms"}
    assert {k: v for k, v in raw.items() if k not in volatile} == {
        k: v for k, v in form.items() if k not in volatile
    }


@pytest.mark.parametrize("content_type", ["image/jpeg", "application/octet-stream", ""])
def test_the_content_and_not_its_declared_type_decides_the_format(
    client: TestClient, content_type: str
) -> None:
    response = client.post(
        "/v1/inspect", content=encoded(picture()), headers={"Content-Type": content_type}
    )

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("render", "format", "size"),
    [("heatmap", "PNG", SIZE), ("overlay", "JPEG", (128, 192)), ("mask", "PNG", (128, 192))],
)
def test_the_picture_comes_in_the_json(
    client: TestClient, render: str, format: str, size: tuple[int, int]
) -> None:
    large = encoded(np.kron(spotted(), np.ones((2, 2, 1), np.uint8)))

    answer = inspect(client, large, render=render).json()

    shown = Image.open(io.BytesIO(base64.b64decode(answer["heatmap"])))
    assert (shown.format, shown.height, shown.width) == (format, *size)
    assert answer["heatmap_type"] == f"image/{format.lower()}"


def test_render_none_leaves_the_picture_out(client: TestClient) -> None:
    answer = inspect(client, encoded(spotted()), render="none").json()

    assert answer["heatmap"] is None and answer["heatmap_type"] is None


def test_accept_png_returns_the_picture_with_the_decision_in_headers(client: TestClient) -> None:
    data = encoded(spotted(0.8))
    answer = inspect(client, data, render="mask").json()

    response = client.post(
        "/v1/inspect?render=mask",
        content=data,
        headers={"Content-Type": "image/png", "Accept": "image/png"},
    )

    assert response.headers["content-type"] == "image/png"
    assert response.content == base64.b64decode(answer["heatmap"])
    assert response.headers["x-decision"] == "anomalous"
    assert float(response.headers["x-score"]) == answer["score"]
    assert float(response.headers["x-threshold"]) == answer["threshold"]
    assert float(response.headers["x-p-value"]) == answer["p_value"]
    assert response.headers["x-model-digest"] == answer["model"]["digest"]
    assert response.headers["x-calibration-id"] == "bundle"
    assert response.headers["x-image-sha256"] == digest(data)


def test_a_threshold_of_the_request_is_used_and_marked(client: TestClient) -> None:
    answer = inspect(client, encoded(spotted(0.8)), threshold=0.9).json()

    assert answer["decision"] == "normal"
    assert answer["threshold_source"] == "request"
    assert answer["threshold"] == pytest.approx(0.9)
    assert answer["regions"] == []


def test_score_equal_to_the_threshold_is_anomalous_everywhere(client: TestClient) -> None:
    score = inspect(client, encoded(spotted(0.8))).json()["score"]

    answer = inspect(client, encoded(spotted(0.8)), threshold=score, render="mask").json()

    assert answer["decision"] == "anomalous"
    assert len(answer["regions"]) == 1
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["heatmap"]))))
    assert mask.sum() == 200


def test_the_callers_request_id_is_kept(client: TestClient) -> None:
    response = client.post(
        "/v1/inspect",
        content=encoded(picture()),
        headers={"Content-Type": "image/png", "X-Request-Id": "line-4:part-0017"},
    )

    assert response.headers["x-request-id"] == "line-4:part-0017"
    assert response.json()["request_id"] == "line-4:part-0017"


@pytest.mark.parametrize("forged", ["a b", "x" * 129, 'x"y'])
def test_a_request_id_that_could_forge_a_log_line_is_replaced(
    client: TestClient, forged: str
) -> None:
    response = client.get("/livez", headers={"X-Request-Id": forged})

    assert response.headers["x-request-id"] != forged


# inspect: refusals


def test_garbage_is_400(client: TestClient) -> None:
    assert_problem(inspect(client, b"garbage"), 400, "7 bytes are not an image")


def test_an_empty_body_is_400(client: TestClient) -> None:
    assert_problem(inspect(client, b""), 400, "0 bytes")


def test_a_truncated_image_is_400(client: TestClient) -> None:
    assert_problem(inspect(client, encoded(picture())[:-30]), 400, "96x64", "truncated")


def test_a_form_without_the_field_is_400_and_names_it(client: TestClient) -> None:
    response = client.post("/v1/inspect", files={"picture": encoded(picture())})

    assert_problem(response, 400, "`image`", "picture")


def test_a_form_with_more_than_the_image_is_400_and_names_what_it_has(client: TestClient) -> None:
    response = client.post(
        "/v1/inspect", files={"image": encoded(picture())}, data={"note": "lot 17"}
    )

    assert_problem(response, 400, "note", "image")


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_broken_form_is_400(client: TestClient, content_type: str) -> None:
    response = client.post(
        "/v1/inspect", content=b"no boundary", headers={"Content-Type": content_type}
    )

    assert_problem(response, 400)


def test_a_format_that_is_not_read_is_415(client: TestClient) -> None:
    assert_problem(inspect(client, encoded(picture()[..., 0], "GIF")), 415, "GIF")


def test_a_body_that_is_no_image_by_type_is_415_and_says_how_to_send_it(
    client: TestClient,
) -> None:
    response = client.post("/v1/inspect", json={"image": "base64"})

    assert_problem(response, 415, "application/json", "image/png", "`image`")


@pytest.mark.parametrize(
    "query",
    [
        {"threshold": "high"},
        {"threshold": "-1"},
        {"threshold": "1e-300"},
        {"threshold": "nan"},
        {"render": "hologram"},
        {"version": "0"},
        {"model": "../etc"},
    ],
)
def test_a_parameter_out_of_bounds_is_422_with_its_value(
    client: TestClient, query: dict[str, str]
) -> None:
    ((name, value),) = query.items()

    assert_problem(inspect(client, encoded(picture()), **query), 422, name, value)


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "9" * 400])
def test_a_deadline_that_is_none_is_422(client: TestClient, value: str) -> None:
    response = client.post(
        "/v1/inspect", content=encoded(picture()), headers={"X-Request-Timeout-Ms": value}
    )

    assert_problem(response, 422, "X-Request-Timeout-Ms", value)


@pytest.mark.parametrize(
    ("render", "accept"),
    [
        ("none", "image/png"),
        ("none", "image/*"),
        ("heatmap", "image/jpeg"),
        ("mask", "image/jpeg"),
        ("overlay", "image/webp"),
    ],
)
def test_a_picture_that_render_does_not_give_is_422(
    client: TestClient, render: str, accept: str
) -> None:
    response = client.post(
        f"/v1/inspect?render={render}", content=encoded(picture()), headers={"Accept": accept}
    )

    assert_problem(response, 422, f"render={render}", accept)


@pytest.mark.parametrize(
    ("render", "accept", "given"),
    [
        ("heatmap", "image/*", "image/png"),
        ("mask", "image/webp, image/png;q=0.5", "image/png"),
        ("overlay", "image/*", "image/jpeg"),
        ("overlay", "image/png, image/jpeg", "image/jpeg"),
        ("overlay", "image/png", "image/png"),
        ("overlay", "IMAGE/JPEG", "image/jpeg"),
        ("overlay", "image/png, application/json", "application/json"),
        ("overlay", "*/*", "application/json"),
        ("overlay", "text/html, */*", "application/json"),
    ],
)
def test_the_accepted_type_decides_the_answers(
    client: TestClient, render: str, accept: str, given: str
) -> None:
    response = client.post(
        f"/v1/inspect?render={render}", content=encoded(spotted()), headers={"Accept": accept}
    )

    assert response.headers["content-type"] == given
    if given != "application/json":
        assert f"image/{Image.open(io.BytesIO(response.content)).format}".lower() == given


def test_an_unknown_model_is_404_with_those_there_are(client: TestClient) -> None:
    assert_problem(inspect(client, encoded(picture()), model="gear"), 404, "'gear'", "part")


def test_an_unknown_version_is_404_with_those_there_are(client: TestClient) -> None:
    assert_problem(inspect(client, encoded(picture()), version=7), 404, "version 7", "[1]")


def test_another_graph_than_the_caller_insists_on_is_409_with_both_digests(
    client: TestClient,
) -> None:
    mine, other = digest(brightness_graph()), "f" * 64

    assert inspect(client, encoded(picture()), digest=mine).status_code == 200
    assert_problem(inspect(client, encoded(picture()), digest=other), 409, mine, other)
    assert_problem(calibrate(client, normal_pictures(2), digest=other), 409, mine, other)


def test_an_unknown_path_is_404_and_a_wrong_method_405(client: TestClient) -> None:
    assert_problem(client.get("/v1/nothing"), 404, "/v1/nothing")
    assert_problem(client.get("/v1/inspect"), 405, "GET /v1/inspect")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/models", "GET, POST"),
        ("/v1/models/part/shadow", "DELETE, GET, PUT"),
        ("/v1/calibrations/deactivate", "POST"),  # which is no calibration's id
        ("/v1/calibrations/cal_1", "DELETE, GET"),
        ("/docs", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: TestClient, path: str, methods: str) -> None:
    answer = client.request("PATCH", path)

    assert_problem(answer, 405)
    assert ", ".join(sorted(answer.headers["allow"].split(", "))) == methods


def test_no_parameter_may_be_null(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    parameters = [
        parameter
        for methods in document["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", ())
    ]
    assert len(parameters) > 50
    assert not any("null" in str(parameter["schema"]) for parameter in parameters)


@pytest.mark.parametrize("kind", ["length", "chunked", "multipart"])
def test_a_body_beyond_the_limit_is_413_with_the_limit(
    settings: Settings, write_bundle: Write, kind: str
) -> None:
    write_bundle()
    small = settings.model_copy(update={"max_image_bytes": 1000})
    noise = encoded(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8))
    with TestClient(create_app(small)) as client:
        if kind == "multipart":
            response = client.post("/v1/inspect", files={"image": noise})
        else:
            content = (
                noise if kind == "length" else (noise[i : i + 300] for i in range(0, 3000, 300))
            )
            response = client.post(
                "/v1/inspect", content=content, headers={"Content-Type": "image/png"}
            )
        assert_problem(response, 413, "bytes; the limit is 1000")
        assert inspect(client, encoded(picture())).status_code == 200


def test_more_pixels_than_the_limit_are_413_with_both_numbers(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    small = settings.model_copy(update={"max_image_pixels": 5000})
    with TestClient(create_app(small)) as client:
        assert_problem(inspect(client, encoded(picture())), 413, "96x64", "5000")


def test_a_failing_graph_is_500_without_a_traceback_and_the_next_image_is_answered(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle(graph=brightness_graph(fragile=True))
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        assert_problem(inspect(client, encoded(picture(1.0))), 500, "CPUExecutionProvider")
        assert inspect(client, encoded(picture(0.1))).json()["decision"] == "normal"


def test_without_a_model_everything_is_503_with_retry_after(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        for response in (inspect(client, encoded(picture())), client.get("/readyz")):
            assert_problem(response, 503, "no bundle in")
            assert int(response.headers["retry-after"]) > 0
        assert client.get("/livez").status_code == 200


def test_a_client_that_leaves_is_499_and_its_image_is_not_decided(
    settings: Settings, write_bundle: Write
) -> None:
    """Spoken in ASGI, where the moment of leaving can be chosen: right after the body."""
    write_bundle()
    app = create_app(settings)
    sent: list[dict] = []
    body = {"type": "http.request", "body": encoded(picture()), "more_body": False}
    messages = iter([body, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(messages)

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/inspect",
        "raw_path": b"/v1/inspect",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"image/png")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))

    assert sent[0]["status"] == 499
    with TestClient(app) as client:
        lines = client.get("/metrics").text.splitlines()
    assert 'skrd4ad_requests_total{method="POST",route="/v1/inspect",status="499"} 1.0' in lines
    assert not any(line.startswith("skrd4ad_decisions_total{") for line in lines)
    assert "skrd4ad_inspections_in_progress 0.0" in lines


# several models and versions


def test_the_model_must_be_named_where_there_are_several(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle("gear")
    write_bundle("part")
    with TestClient(create_app(settings)) as client:
        assert_problem(inspect(client, encoded(picture())), 422, "gear, part")
        assert inspect(client, encoded(picture()), model="gear").json()["model"]["name"] == "gear"


def test_the_newest_version_answers_and_others_on_request(
    settings: Settings, write_bundle: Write
) -> None:
    for version in (1, 2):
        write_bundle(version=version, scores=(0.1 * version,) * 9)
    with TestClient(create_app(settings)) as client:
        assert inspect(client, encoded(picture())).json()["model"]["version"] == 2
        older = inspect(client, encoded(picture()), version=1).json()
        assert older["model"]["version"] == 1
        assert older["threshold"] == pytest.approx(0.1, rel=1e-4)
        assert [m["version"] for m in client.get("/v1/models").json()] == [2, 1]


def test_a_damaged_older_version_is_500_by_name_and_the_newest_still_answers(
    settings: Settings, write_bundle: Write
) -> None:
    damaged = write_bundle(version=1).folder / "model.onnx"
    damaged.write_bytes(b"other")
    write_bundle(version=2)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        assert_problem(inspect(client, encoded(picture()), version=1), 500, "part/1/model.onnx")
        assert inspect(client, encoded(picture())).status_code == 200


def test_one_older_version_of_a_model_stays_loaded(settings: Settings, write_bundle: Write) -> None:
    for version in (1, 2, 3):
        write_bundle(version=version)
    with TestClient(create_app(settings)) as client:
        for version in (1, 2, 1, 2):
            answer = inspect(client, encoded(picture()), version=version).json()
            assert answer["model"]["version"] == version
            loaded = [m["version"] for m in client.get("/v1/models").json() if m["loaded"]]
            assert loaded == [3, version]


def test_a_broken_bundle_stops_the_start_and_is_named(
    settings: Settings, write_bundle: Write
) -> None:
    bundle = write_bundle()
    (bundle.folder / "model.onnx").write_bytes(b"other")

    with pytest.raises(BundleError, match=r"part/1/model.onnx: SHA-256"):
        create_app(settings)


def test_a_bundle_in_another_models_folder_stops_the_start(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle("part").folder.parent.rename(settings.models / "gear")

    with pytest.raises(BundleError, match="says part version 1"):
        create_app(settings)


# calibrate


def test_a_calibration_answers_with_its_threshold_and_is_used(client: TestClient) -> None:
    response = calibrate(client, normal_pictures(40), target_fpr=0.05)

    assert response.status_code == 201
    made = response.json()
    assert made["samples"] == 40
    assert made["min_samples_needed"] == 19
    assert made["target_fpr"] == 0.05
    assert made["achievable_fpr"] == pytest.approx(2 / 41)
    assert made["active"] is True
    assert made["failed"] == made["duplicates"] == []
    assert made["outliers"][0]["name"] == "039.png"
    assert made["quantiles"]["min"] < made["quantiles"]["q50"] < made["quantiles"]["max"]
    answer = inspect(client, encoded(picture(0.25))).json()
    assert answer["decision"] == "anomalous"  # normal at the bundle's own threshold of 0.3
    assert answer["threshold"] == made["threshold"]
    assert answer["threshold_source"] == "calibration"
    assert answer["calibration"] == {
        "id": made["id"],
        "profile": None,
        "target_fpr": 0.05,
        "confidence": None,
        "samples": 40,
    }


def test_a_calibration_survives_a_restart(settings: Settings, write_bundle: Write) -> None:
    write_bundle()
    with TestClient(create_app(settings)) as client:
        made = calibrate(client, normal_pictures(40), target_fpr=0.05).json()

    with TestClient(create_app(settings)) as client:
        answer = inspect(client, encoded(picture())).json()
        (listed,) = client.get("/v1/calibrations").json()

    assert answer["calibration"]["id"] == listed["id"] == made["id"]
    assert answer["threshold"] == listed["threshold"] == made["threshold"]
    assert listed["active"] is True


def test_one_that_is_not_activated_is_listed_and_not_used(client: TestClient) -> None:
    made = calibrate(client, normal_pictures(40), target_fpr=0.05, activate="false").json()

    assert made["active"] is False
    assert [c["id"] for c in client.get("/v1/calibrations").json()] == [made["id"]]
    assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"


def test_a_new_version_of_a_model_does_not_inherit_a_calibration(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle(version=1)
    with TestClient(create_app(settings)) as client:
        calibrate(client, normal_pictures(40), target_fpr=0.05)
    write_bundle(version=2, graph=brightness_graph(fragile=True))  # another graph, another digest

    with TestClient(create_app(settings)) as client:
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"
        older = inspect(client, encoded(picture()), version=1).json()
        assert older["calibration"]["id"] != "bundle"


def test_too_few_samples_are_422_with_the_number_needed(client: TestClient) -> None:
    problem = assert_problem(calibrate(client, normal_pictures(20)), 422, "at least 99", "got 20")

    assert (problem["samples"], problem["min_samples_needed"]) == (20, 99)
    assert client.get("/v1/calibrations").json() == []


def test_unreadable_samples_are_reported_and_the_rest_counts(client: TestClient) -> None:
    images = [*normal_pictures(20), ("notes.txt", b"not an image"), ("empty.png", b"")]

    made = calibrate(client, images, target_fpr=0.05).json()

    assert made["samples"] == 20
    assert {failure["name"] for failure in made["failed"]} == {"notes.txt", "empty.png"}


def test_a_sample_beyond_the_byte_limit_is_reported(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    small = settings.model_copy(update={"max_image_bytes": 5000})
    noise = encoded(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8))
    with TestClient(create_app(small)) as client:
        made = calibrate(client, [*normal_pictures(20), ("big.png", noise)], target_fpr=0.05).json()

    assert made["samples"] == 20
    (failure,) = made["failed"]
    assert failure["name"] == "big.png"
    assert "the limit is 5000 bytes" in failure["reason"]


def test_a_picture_sent_twice_counts_once_even_in_another_file(client: TestClient) -> None:
    images = normal_pictures(19)
    saved_anew = encoded(image.decode(images[3][1]), "BMP")

    made = calibrate(
        client, [*images, ("again.png", images[0][1]), ("anew.bmp", saved_anew)], target_fpr=0.05
    ).json()

    assert made["samples"] == 19
    assert made["duplicates"] == ["again.png", "anew.bmp"]


def test_a_file_that_was_trained_on_never_calibrates(
    settings: Settings, write_bundle: Write
) -> None:
    bundle = write_bundle()
    images = normal_pictures(21)
    path = bundle.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["data"]["trained"] = [digest(images[5][1])]
    path.write_text(json.dumps(manifest))
    with TestClient(create_app(settings)) as client:
        made = calibrate(client, images, target_fpr=0.05).json()

    assert made["samples"] == 20
    (failure,) = made["failed"]
    assert failure["name"] == "005.png"
    assert "trained on" in failure["reason"]


def test_a_failing_graph_is_no_fault_of_the_sample(settings: Settings, write_bundle: Write) -> None:
    write_bundle(graph=brightness_graph(fragile=True))
    images = [*normal_pictures(20), ("white.png", encoded(picture(1.0)))]
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        assert_problem(calibrate(client, images, target_fpr=0.05), 500, "CPUExecutionProvider")
        assert client.get("/v1/calibrations").json() == []


def test_calibrations_of_models_with_the_same_graph_stay_apart_over_a_restart(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle("left")
    write_bundle("right")
    told = {}
    with TestClient(create_app(settings)) as client:
        for name, images in (("left", normal_pictures(25)), ("right", normal_pictures(40)[20:])):
            made = calibrate(client, images, target_fpr=0.05, model=name).json()
            told[name] = made["threshold"], made["id"]

    with TestClient(create_app(settings)) as client:
        for name in told:
            answer = inspect(client, encoded(picture()), model=name).json()
            assert (answer["threshold"], answer["calibration"]["id"]) == told[name]


def test_an_earlier_calibration_can_be_activated_again(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    with TestClient(create_app(settings)) as client:
        first = calibrate(client, normal_pictures(25), target_fpr=0.05).json()
        second = calibrate(client, normal_pictures(40), target_fpr=0.05).json()
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == second["id"]

        activated = client.post(f"/v1/calibrations/{first['id']}/activate").json()

        assert activated["id"] == first["id"] and activated["active"] is True
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == first["id"]
    with TestClient(create_app(settings)) as client:
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == first["id"]


def test_deactivating_goes_back_to_the_bundles_threshold_and_stays_there(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    with TestClient(create_app(settings)) as client:
        made = calibrate(client, normal_pictures(25), target_fpr=0.05).json()

        reference = client.post("/v1/calibrations/deactivate").json()

        assert reference["id"] == "bundle"
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"
        (listed,) = client.get("/v1/calibrations").json()
        assert (listed["id"], listed["active"]) == (made["id"], False)
    with TestClient(create_app(settings)) as client:
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"


def test_a_misspelt_parameter_never_calibrates_with_the_default(client: TestClient) -> None:
    response = calibrate(client, normal_pictures(25), targetfpr=0.05)

    assert_problem(response, 422, "'targetfpr'", "target_fpr")
    assert client.get("/v1/calibrations").json() == []


def test_an_unknown_calibration_is_404(client: TestClient) -> None:
    assert_problem(client.post("/v1/calibrations/cal_1/activate"), 404, "'cal_1'")


def test_a_calibration_of_a_graph_that_was_replaced_is_409(
    settings: Settings, write_bundle: Write
) -> None:
    folder = write_bundle().folder
    with TestClient(create_app(settings)) as client:
        made = calibrate(client, normal_pictures(25), target_fpr=0.05).json()
    shutil.rmtree(folder)
    write_bundle(graph=brightness_graph(fragile=True))

    with TestClient(create_app(settings)) as client:
        assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"
        response = client.post(f"/v1/calibrations/{made['id']}/activate")
        assert_problem(response, 409, made["model"]["digest"])


@pytest.fixture
def uncalibrated(settings: Settings, write_bundle: Write) -> Iterator[TestClient]:
    """The app with an imported network, whose bundle brought no normal images."""
    write_bundle(scores=())
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def test_a_model_without_a_threshold_is_409_and_says_what_to_do(uncalibrated: TestClient) -> None:
    for data in (encoded(spotted()), b"refused before it is decoded"):
        answer = inspect(uncalibrated, data)
        problem = assert_problem(answer, 409, "part/1 has no threshold", "/v1/calibrate")
        assert problem["type"] == "urn:skrd4ad:problem:uncalibrated"


def test_a_model_without_a_threshold_takes_the_requests(uncalibrated: TestClient) -> None:
    answer = inspect(uncalibrated, encoded(spotted(0.8)), threshold=0.5).json()
    assert (answer["decision"], answer["threshold_source"]) == ("anomalous", "request")
    assert answer["p_value"] is None and answer["calibration"] is None
    assert len(answer["regions"]) == 1

    headers = {"Content-Type": "image/png", "Accept": "image/png"}
    picture = uncalibrated.post(
        "/v1/inspect", content=encoded(spotted()), params={"threshold": 0.5}, headers=headers
    )
    assert picture.headers["x-decision"] == "anomalous"
    assert "x-p-value" not in picture.headers and "x-calibration-id" not in picture.headers


def test_a_model_without_a_threshold_is_ready_and_told_as_such(uncalibrated: TestClient) -> None:
    assert uncalibrated.get("/readyz").status_code == 200
    (model,) = uncalibrated.get("/v1/models").json()
    assert model["threshold"] is None and model["calibration"] is None
    metrics = uncalibrated.get("/metrics").text
    assert 'skrd4ad_threshold{model="part",profile=""} NaN' in metrics
    assert 'skrd4ad_calibration_samples{model="part",profile=""} 0.0' in metrics


def test_calibrating_gives_a_model_its_first_threshold(uncalibrated: TestClient) -> None:
    made = calibrate(uncalibrated, normal_pictures(19), target_fpr=0.05)
    assert made.status_code == 201

    answer = inspect(uncalibrated, encoded(spotted())).json()
    assert answer["threshold"] == made.json()["threshold"] and answer["p_value"] == 1 / 20
    (model,) = uncalibrated.get("/v1/models").json()
    assert model["calibration"]["id"] == made.json()["id"]
    assert (
        'skrd4ad_calibration_samples{model="part",profile=""} 19.0'
        in uncalibrated.get("/metrics").text
    )


def test_there_is_no_way_back_to_a_threshold_that_never_was(uncalibrated: TestClient) -> None:
    calibrate(uncalibrated, normal_pictures(19), target_fpr=0.05)

    refusal = uncalibrated.post("/v1/calibrations/deactivate")
    assert_problem(refusal, 409, "part/1 brought no threshold")
    assert inspect(uncalibrated, encoded(spotted())).json()["decision"] == "anomalous"


def test_a_rate_near_one_is_answered_like_any_other(client: TestClient) -> None:
    assert_problem(
        calibrate(client, [("a.png", b"no image")], target_fpr=0.9999999999), 422, "at least 1"
    )
    made = calibrate(client, normal_pictures(3), target_fpr=0.9999999999).json()
    assert made["achievable_fpr"] <= 0.75


@pytest.mark.parametrize("target", ["0", "1", "2", "-0.1", "nan", "low"])
def test_a_rate_outside_zero_and_one_is_422(client: TestClient, target: str) -> None:
    assert_problem(calibrate(client, normal_pictures(2), target_fpr=target), 422, "target_fpr")


def test_an_unknown_field_is_422_and_named(client: TestClient) -> None:
    response = client.post("/v1/calibrate", files={"image": encoded(picture())})

    assert_problem(response, 422, "'image'", "`images`")


def test_calibrating_with_a_raw_body_is_415(client: TestClient) -> None:
    response = client.post(
        "/v1/calibrate", content=encoded(picture()), headers={"Content-Type": "image/png"}
    )

    assert_problem(response, 415, "multipart/form-data", "`images`")


def test_more_images_than_the_limit_are_refused(settings: Settings, write_bundle: Write) -> None:
    write_bundle()
    small = settings.model_copy(update={"max_calibration_images": 10})
    with TestClient(create_app(small)) as client:
        assert_problem(calibrate(client, normal_pictures(11)), 400, "10")


def test_calibrations_are_listed_by_model(client: TestClient) -> None:
    calibrate(client, normal_pictures(20), target_fpr=0.05)

    assert len(client.get("/v1/calibrations", params={"model": "part"}).json()) == 1
    assert client.get("/v1/calibrations", params={"model": "gear"}).json() == []


# operation


def test_models_tell_what_serves(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()

    assert (model["name"], model["version"], model["versions"]) == ("part", 1, [1])
    assert model["digest"] == digest(brightness_graph())
    assert model["image_size"] == list(SIZE)
    assert model["provider"] == "CPUExecutionProvider"
    assert model["calibration"]["samples"] == 99


def test_probes_may_carry_parameters_of_their_own(client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert client.get(path, params={"probe": "1"}).status_code == 200


def test_metrics_count_requests_decisions_and_stages(client: TestClient) -> None:
    inspect(client, encoded(spotted(0.8)))
    inspect(client, encoded(picture()))
    inspect(client, b"garbage")
    client.get("/secret/one")
    client.get("/secret/two")
    calibrate(client, normal_pictures(20), target_fpr=0.05)

    lines = client.get("/metrics").text.splitlines()

    assert 'skrd4ad_requests_total{method="POST",route="/v1/inspect",status="200"} 2.0' in lines
    assert 'skrd4ad_requests_total{method="POST",route="/v1/inspect",status="400"} 1.0' in lines
    assert 'skrd4ad_requests_total{method="GET",route="unknown",status="404"} 2.0' in lines
    assert 'skrd4ad_decisions_total{decision="anomalous",model="part"} 1.0' in lines
    assert 'skrd4ad_decisions_total{decision="normal",model="part"} 1.0' in lines
    assert 'skrd4ad_image_score_count{model="part"} 2.0' in lines
    engine = 'batch_sizes="1,2,4,8",precision="float32",provider="CPUExecutionProvider"'
    assert f"skrd4ad_provider_info{{{engine}}} 1.0" in lines
    assert "skrd4ad_queue_size 0.0" in lines
    assert 'skrd4ad_calibration_samples{model="part",profile=""} 20.0' in lines
    for stage in ("decode", "queue", "infer", "render", "total"):
        assert f'skrd4ad_stage_duration_seconds_count{{stage="{stage}"}} 2.0' in lines
    (info,) = (line for line in lines if line.startswith("skrd4ad_model_info{"))
    assert digest(brightness_graph()) in info
    (threshold,) = (line for line in lines if line.startswith("skrd4ad_threshold{"))
    assert float(threshold.split()[-1]) == pytest.approx(0.2, rel=1e-3)


def test_the_openapi_documents_bodies_examples_and_errors(client: TestClient) -> None:
    api = client.get("/openapi.json").json()

    inspect_route = api["paths"]["/v1/inspect"]["post"]
    assert set(inspect_route["requestBody"]["content"]) == {"image/*", "multipart/form-data"}
    assert {"400", "404", "409", "413", "415", "422", "429", "500", "503", "504"} <= set(
        inspect_route["responses"]
    )
    assert "image/png" in inspect_route["responses"]["200"]["content"]
    for schema in ("Inspection", "NewCalibration", "Problem"):
        assert api["components"]["schemas"][schema]["examples"]
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            assert route.get("description"), f"{method} {path} says nothing of itself"
            for status, response in route["responses"].items():
                if int(status) >= 400:
                    assert set(response["content"]) == {"application/problem+json"}, (path, status)


def test_an_example_in_the_openapi_is_a_valid_answer(client: TestClient) -> None:
    from service.schemas import Inspection, NewCalibration, Problem

    for model in (Inspection, NewCalibration, Problem):
        for example in model.model_json_schema()["examples"]:
            model.model_validate(example)


def test_the_state_folder_is_made_where_it_is_missing(client: TestClient, tmp_path: Path) -> None:
    assert (tmp_path / "state" / "service.sqlite").is_file()

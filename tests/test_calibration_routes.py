"""Calibrations over HTTP: filled over time, examined, finished, put in force, taken back."""

import io
import logging
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime

import numpy as np
import pytest
from conftest import (
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
from test_app import assert_problem

from service import image
from service.app import create_app
from service.bundle import Bundle
from service.heatmap import heatmap
from service.image import digest
from service.settings import Settings

Write = Callable[..., Bundle]
Named = list[tuple[str, bytes]]


def open_one(client: TestClient, **query: object) -> str:
    response = client.post("/v1/calibrations", params=query)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def add(client: TestClient, id: str, images: Named):
    files = [("images", (name, data, "image/png")) for name, data in images]
    return client.post(f"/v1/calibrations/{id}/samples", files=files)


def finish(client: TestClient, id: str, **query: object):
    return client.post(f"/v1/calibrations/{id}/finish", params={"target_fpr": 0.05, **query})


def zipped(images: Named) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in images:
            archive.writestr(f"good/{name}", data)
    return buffer.getvalue()


def contaminated(count: int = 40) -> Named:
    """Normal pictures with a defect among them, which scores three times as high."""
    return [*normal_pictures(count), ("defect.png", encoded(spotted(0.6)))]


@pytest.fixture
def on_any_database(
    settings: Settings, database_url: str, write_bundle: Write
) -> Iterator[TestClient]:
    write_bundle()
    settings = settings.model_copy(update={"database_url": database_url})
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def test_one_filled_in_many_requests_is_the_one_made_at_once(on_any_database: TestClient) -> None:
    client, images = on_any_database, normal_pictures(40)
    at_once = calibrate(client, images, target_fpr=0.05, activate="false").json()
    id = open_one(client)

    for part in range(0, 40, 16):
        added = add(client, id, images[part : part + 16]).json()
    assert (added["added"], added["samples"]) == (8, 40)
    assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"
    finished = finish(client, id).json()

    differing = ("id", "created", "finished", "active", "outliers")
    same = {name for name in finished if name not in differing}
    assert {name: finished[name] for name in same} == {name: at_once[name] for name in same}
    assert (finished["state"], finished["active"]) == ("finished", True)
    answer = inspect(client, encoded(picture(0.25))).json()
    assert (answer["calibration"]["id"], answer["decision"]) == (id, "anomalous")


def test_samples_come_as_files_of_a_form_or_of_an_archive(client: TestClient) -> None:
    images = normal_pictures(40)
    as_form, as_zip = open_one(client), open_one(client)
    add(client, as_form, images)

    response = client.post(
        f"/v1/calibrations/{as_zip}/samples",
        content=zipped(images),
        headers={"Content-Type": "application/zip"},
    )

    assert response.json()["added"] == 40
    thresholds = [finish(client, id).json()["threshold"] for id in (as_form, as_zip)]
    assert thresholds[0] == thresholds[1]


def test_an_archive_calibrates_at_once_as_well(client: TestClient) -> None:
    response = client.post(
        "/v1/calibrate?target_fpr=0.05",
        content=zipped([*normal_pictures(20), ("notes.txt", b"no image")]),
        headers={"Content-Type": "application/zip"},
    )

    made = response.json()
    assert (response.status_code, made["samples"]) == (201, 20)
    assert [failure["name"] for failure in made["failed"]] == ["good/notes.txt"]


def test_a_damaged_archive_is_400_and_what_came_before_the_damage_is_kept(
    client: TestClient,
) -> None:
    id, images = open_one(client), normal_pictures(40)
    whole = zipped(images)
    headers = {"Content-Type": "application/zip"}
    path = f"/v1/calibrations/{id}/samples"

    assert_problem(client.post(path, content=whole[: len(whole) // 4], headers=headers), 400, "zip")
    again = client.post(path, content=whole, headers=headers).json()

    assert again["samples"] == 40 and again["failed"] == []


def test_sending_samples_again_changes_nothing_and_scores_nothing(client: TestClient) -> None:
    id, images = open_one(client), normal_pictures(25)
    add(client, id, images)
    scored = client.get("/metrics").text
    scored = re.findall(r"skrd4ad_batch_size_sum (\S+)", scored)

    again = add(client, id, images).json()

    assert (again["added"], again["samples"]) == (0, 25)
    assert sorted(again["duplicates"]) == sorted(name for name, _ in images)
    assert re.findall(r"skrd4ad_batch_size_sum (\S+)", client.get("/metrics").text) == scored


def test_the_same_pixels_in_another_file_count_once(client: TestClient) -> None:
    id, images = open_one(client), normal_pictures(19)
    add(client, id, images)
    saved_anew = encoded(image.decode(images[3][1]), "BMP")

    again = add(client, id, [("anew.bmp", saved_anew)]).json()

    assert (again["samples"], again["duplicates"]) == (19, ["anew.bmp"])


def test_an_open_one_goes_on_after_a_restart(
    settings: Settings, database_url: str, write_bundle: Write
) -> None:
    write_bundle()
    settings = settings.model_copy(update={"database_url": database_url})
    images = normal_pictures(40)
    with TestClient(create_app(settings)) as client:
        id = open_one(client)
        add(client, id, images[:25])

    with TestClient(create_app(settings)) as client:
        assert add(client, id, images).json()["added"] == 15
        assert finish(client, id).json()["samples"] == 40


def test_too_few_samples_are_422_with_what_is_missing_and_it_stays_open(client: TestClient) -> None:
    id = open_one(client)
    add(client, id, normal_pictures(25))

    problem = assert_problem(finish(client, id, target_fpr=0.01), 422, "at least 99", "got 25")
    assert (problem["samples"], problem["min_samples_needed"]) == (25, 99)
    confident = finish(client, id, confidence=0.95)
    assert_problem(confident, 422, "with confidence 0.95", "at least 59", "finest rate is 0.11")

    assert client.get(f"/v1/calibrations/{id}").json()["state"] == "open"
    assert finish(client, id).status_code == 200


def test_a_confidence_raises_the_threshold_and_is_told(client: TestClient) -> None:
    images = normal_pictures(120)
    plain = calibrate(client, images, target_fpr=0.05).json()

    confident = calibrate(client, images, target_fpr=0.05, confidence=0.95).json()

    assert confident["threshold"] > plain["threshold"]
    assert confident["achievable_fpr"] <= 0.05
    assert (confident["confidence"], confident["min_samples_needed"]) == (0.95, 59)
    answer = inspect(client, encoded(picture())).json()
    assert answer["calibration"]["confidence"] == 0.95


# Contamination


def test_a_defect_among_the_samples_is_suspected_and_not_put_in_force(
    client: TestClient, caplog
) -> None:
    made = calibrate(client, contaminated(), target_fpr=0.05).json()

    assert made["note"].startswith("not in force: 1 of the samples stand apart")
    assert f"source={made['id']}" in made["note"]
    assert f"calibration {made['id']} is not in force" in caplog.text

    assert made["tail"]["suspects"] == 1 and made["tail"]["p_value"] <= 0.01
    assert made["outliers"][0]["name"] == "defect.png"
    assert (made["state"], made["active"]) == ("finished", False)
    assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"


def test_whoever_looked_can_put_it_in_force_all_the_same(client: TestClient) -> None:
    made = calibrate(client, contaminated(), target_fpr=0.05).json()
    assert client.post(f"/v1/calibrations/{made['id']}/activate").json()["active"] is True

    told = calibrate(client, contaminated(41), target_fpr=0.05, activate="true").json()

    assert told["tail"]["suspects"] == 1 and told["active"] is True


def test_a_defect_is_excluded_in_a_new_one_without_scoring_anything_again(
    client: TestClient,
) -> None:
    clean = calibrate(client, normal_pictures(40), target_fpr=0.05, activate="false").json()
    made = calibrate(client, contaminated(), target_fpr=0.05).json()
    suspect = made["outliers"][0]["sha256"]
    scored = re.findall(r"skrd4ad_batch_size_sum (\S+)", client.get("/metrics").text)

    opened = client.post("/v1/calibrations", params={"source": made["id"]}).json()
    id = opened["id"]
    assert (opened["state"], opened["samples"]) == ("open", made["samples"])
    excluded = client.post(f"/v1/calibrations/{id}/samples/{suspect}/exclude").json()
    finished = finish(client, id).json()

    assert (excluded["name"], excluded["excluded"]) == ("defect.png", True)
    assert re.findall(r"skrd4ad_batch_size_sum (\S+)", client.get("/metrics").text) == scored
    assert finished["threshold"] == clean["threshold"] < made["threshold"]
    assert (finished["samples"], finished["excluded"], finished["source"]) == (40, 1, made["id"])
    assert finished["tail"]["suspects"] == 0 and finished["active"] is True
    assert finished["note"] is None


def test_an_excluded_sample_can_be_included_again(client: TestClient) -> None:
    id, images = open_one(client), normal_pictures(30)
    add(client, id, images)
    path = f"/v1/calibrations/{id}/samples/{digest(images[0][1])}"

    assert client.post(f"{path}/exclude").json()["excluded"] is True
    assert client.get(f"/v1/calibrations/{id}").json()["samples"] == 29
    assert client.post(f"{path}/include").json()["excluded"] is False

    assert client.get(f"/v1/calibrations/{id}").json()["samples"] == 30


def test_the_highest_samples_are_shown_with_their_heatmaps(client: TestClient) -> None:
    id, images = open_one(client), contaminated()
    add(client, id, images)

    told = client.get(f"/v1/calibrations/{id}").json()
    shown = told["outliers"]
    assert "exclude those that are no good parts" in told["note"]
    response = client.get(shown[0]["heatmap"])

    assert shown[0]["name"] == "defect.png"
    assert [sample["score"] for sample in shown] == sorted(
        (sample["score"] for sample in shown), reverse=True
    )
    assert response.headers["content-type"] == "image/png"
    threshold = inspect(client, images[0][1]).json()["threshold"]
    brightness = image.decode(images[-1][1]).mean(axis=2) / 255
    expected = Image.open(io.BytesIO(heatmap(brightness.astype(np.float16), threshold)))
    assert Image.open(io.BytesIO(response.content)).tobytes() == expected.tobytes()


def test_of_samples_beyond_the_highest_no_heatmap_is_kept(client: TestClient) -> None:
    id = open_one(client)
    add(client, id, normal_pictures(40))
    lowest = client.get(f"/v1/calibrations/{id}/samples?offset=39").json()

    assert len(lowest) == 1
    assert_problem(client.get(lowest[0]["heatmap"]), 404, "32 highest")


def test_samples_are_listed_in_pages(client: TestClient) -> None:
    id = open_one(client)
    add(client, id, normal_pictures(30))

    pages = [
        client.get(f"/v1/calibrations/{id}/samples", params={"limit": 8, "offset": offset}).json()
        for offset in range(0, 32, 8)
    ]

    assert [len(page) for page in pages] == [8, 8, 8, 6]
    listed = [sample for page in pages for sample in page]
    assert {sample["name"] for sample in listed} == {f"{i:03}.png" for i in range(30)}
    scores = [sample["score"] for sample in listed]
    assert scores == sorted(scores, reverse=True)


# Profiles


def test_a_profile_has_its_own_calibration_and_falls_back_to_the_models(client: TestClient) -> None:
    left = calibrate(client, normal_pictures(25), target_fpr=0.05, profile="left").json()
    assert inspect(client, encoded(picture())).json()["calibration"]["id"] == "bundle"

    answer = inspect(client, encoded(picture()), profile="left").json()
    assert (answer["profile"], answer["calibration"]["profile"]) == ("left", "left")
    assert answer["calibration"]["id"] == left["id"]
    other = inspect(client, encoded(picture()), profile="right").json()
    assert (other["profile"], other["threshold_source"]) == ("right", "bundle")

    model = calibrate(client, normal_pictures(40), target_fpr=0.05).json()
    other = inspect(client, encoded(picture()), profile="right").json()
    assert other["calibration"]["id"] == model["id"]
    assert other["calibration"]["profile"] is None
    assert (
        inspect(client, encoded(picture()), profile="left").json()["threshold"]
        == (left["threshold"])
    )
    (told,) = client.get("/v1/models").json()
    assert told["calibration"]["id"] == model["id"]
    assert {name: own["id"] for name, own in told["profiles"].items()} == {"left": left["id"]}


def test_a_profile_goes_back_to_the_models_calibration(client: TestClient) -> None:
    model = calibrate(client, normal_pictures(40), target_fpr=0.05).json()
    calibrate(client, normal_pictures(25), target_fpr=0.05, profile="left")

    reference = client.post("/v1/calibrations/deactivate?profile=left").json()

    assert reference["id"] == model["id"]
    assert (
        inspect(client, encoded(picture()), profile="left").json()["calibration"]["id"]
        == (model["id"])
    )


def test_a_misspelt_profile_is_neither_deactivated_nor_rolled_back(client: TestClient) -> None:
    calibrate(client, normal_pictures(25), target_fpr=0.05, profile="left")

    for change in ("deactivate", "roll-back"):
        response = client.post(f"/v1/calibrations/{change}?profile=letf")
        assert_problem(response, 409, "profile letf")

    assert len(client.get("/v1/activations").json()) == 1


def test_excluded_samples_make_room_for_those_to_look_at(client: TestClient) -> None:
    id = open_one(client)
    add(client, id, normal_pictures(30))
    highest = client.get(f"/v1/calibrations/{id}").json()["outliers"]
    for sample in highest:
        client.post(f"/v1/calibrations/{id}/samples/{sample['sha256']}/exclude")

    shown = client.get(f"/v1/calibrations/{id}").json()["outliers"]

    assert len(shown) == 10 and not any(sample["excluded"] for sample in shown)


def test_a_refusal_for_too_few_tells_why_files_were_no_samples(client: TestClient) -> None:
    response = calibrate(client, [("good.zip", zipped(normal_pictures(2)))], target_fpr=0.05)

    assert_problem(response, 422, "1 refused, as good.zip: ", "send some first")


@pytest.mark.parametrize("profile", ["Left", "a b", "../up", "x" * 65])
def test_a_profile_that_is_no_name_is_422(client: TestClient, profile: str) -> None:
    assert_problem(inspect(client, encoded(picture()), profile=profile), 422, "profile")


# In force


def test_rolling_back_goes_back_step_by_step(on_any_database: TestClient) -> None:
    client = on_any_database
    first = calibrate(client, normal_pictures(25), target_fpr=0.05).json()
    calibrate(client, normal_pictures(40), target_fpr=0.05)

    assert client.post("/v1/calibrations/roll-back").json()["id"] == first["id"]
    assert inspect(client, encoded(picture())).json()["calibration"]["id"] == first["id"]
    assert client.post("/v1/calibrations/roll-back").json()["id"] == "bundle"
    assert inspect(client, encoded(picture())).json()["threshold_source"] == "bundle"
    assert_problem(client.post("/v1/calibrations/roll-back"), 409, "part version 1")


def test_every_change_is_told_with_who_and_when(client: TestClient, caplog) -> None:
    caplog.set_level(logging.INFO)
    made = calibrate(client, normal_pictures(25), target_fpr=0.05).json()
    client.post("/v1/calibrations/roll-back")

    back, forth = client.get("/v1/activations").json()

    assert (forth["calibration"], forth["rolled_back"], forth["by"]) == (
        made["id"],
        False,
        "anonymous",
    )
    assert forth["threshold"] == made["threshold"]
    assert (back["calibration"], back["rolled_back"]) == ("bundle", True)
    assert back["threshold"] is None
    assert forth["at"] < back["at"]
    told = [record.getMessage() for record in caplog.records if made["id"] in record.getMessage()]
    assert any(f"threshold {made['threshold']:.4f} from {made['id']}" in line for line in told)
    assert any(f"was {made['id']}" in line for line in told)


def test_one_in_force_is_not_deleted_and_another_leaves_the_list(client: TestClient) -> None:
    first = calibrate(client, normal_pictures(25), target_fpr=0.05).json()["id"]
    second = calibrate(client, normal_pictures(40), target_fpr=0.05).json()["id"]

    assert_problem(client.delete(f"/v1/calibrations/{second}"), 409, second, "in force")
    assert client.delete(f"/v1/calibrations/{first}").status_code == 204

    assert [c["id"] for c in client.get("/v1/calibrations").json()] == [second]
    told = client.get(f"/v1/calibrations/{first}").json()
    assert (told["state"], told["deleted_by"]) == ("deleted", "anonymous")
    assert_problem(client.post(f"/v1/calibrations/{first}/activate"), 404, "was deleted")


def test_a_finished_one_takes_no_samples_and_says_what_to_do(client: TestClient) -> None:
    made = calibrate(client, normal_pictures(25), target_fpr=0.05).json()["id"]

    assert_problem(add(client, made, normal_pictures(3)), 409, f"source={made}")
    assert_problem(finish(client, made), 409, f"source={made}")


def test_an_open_one_is_not_put_in_force(client: TestClient) -> None:
    id = open_one(client)

    assert_problem(client.post(f"/v1/calibrations/{id}/activate"), 409, "finish it first")


def test_what_is_not_there_is_404(client: TestClient) -> None:
    id = open_one(client)
    sample = f"/v1/calibrations/{id}/samples/{'f' * 64}"

    for response in (
        client.get("/v1/calibrations/cal_1"),
        client.get("/v1/calibrations/cal_1/samples"),
        client.delete("/v1/calibrations/cal_1"),
        add(client, "cal_1", normal_pictures(1)),
        finish(client, "cal_1"),
        client.post("/v1/calibrations", params={"source": "cal_1"}),
    ):
        assert_problem(response, 404, "'cal_1'")
    for response in (client.get(f"{sample}/heatmap"), client.post(f"{sample}/exclude")):
        assert_problem(response, 404, "f" * 64)
    assert_problem(client.post("/v1/calibrations?model=gear"), 404, "'gear'")


def test_numbers_that_no_calibration_can_have_are_422(client: TestClient) -> None:
    id = open_one(client)
    add(client, id, normal_pictures(25))

    for name, value in (("target_fpr", 1e-320), ("confidence", 1e-10), ("confidence", 1.0)):
        assert_problem(finish(client, id, **{name: value}), 422, f"{name} =")
    assert_problem(client.get(f"/v1/inspections?version={10**20}"), 422, "version =")
    assert finish(client, id, target_fpr=0.99, confidence=0.5).status_code == 200


@pytest.mark.parametrize("path", ["%00", "%F0%9F%98%80", "x" * 65, "a%20b"])
def test_an_id_that_can_be_none_is_422(on_any_database: TestClient, path: str) -> None:
    assert_problem(on_any_database.get(f"/v1/calibrations/{path}"), 422, "id =")
    response = on_any_database.get(f"/v1/calibrations/cal_1/samples?offset={10**20}")
    assert_problem(response, 422, "offset =")


def test_whatever_a_file_is_called_it_is_a_sample(on_any_database: TestClient) -> None:
    client, id = on_any_database, open_one(on_any_database)
    names = [b"nul\0.png", b"latin-\xe4.png", "\U0001f600.png".encode(), b"long" * 200 + b".png"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, (_, data) in zip(names, normal_pictures(4), strict=True):
            member = tarfile.TarInfo(name.decode(errors="surrogateescape"))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    response = client.post(
        f"/v1/calibrations/{id}/samples",
        content=buffer.getvalue(),
        headers={"Content-Type": "application/x-tar"},
    )

    assert (response.status_code, response.json()["added"]) == (200, 4)
    listed = [sample["name"] for sample in client.get(f"/v1/calibrations/{id}/samples").json()]
    assert {name[-255:] for name in listed} == set(listed)
    assert "\U0001f600.png" in listed


def test_a_calibration_of_a_graph_that_was_replaced_takes_no_more_samples(
    settings: Settings, write_bundle: Write
) -> None:
    folder = write_bundle().folder
    with TestClient(create_app(settings)) as client:
        id = open_one(client)
        digest_then = client.get(f"/v1/calibrations/{id}").json()["model"]["digest"]
    shutil.rmtree(folder)
    write_bundle(graph=brightness_graph(fragile=True))

    with TestClient(create_app(settings)) as client:
        assert_problem(add(client, id, normal_pictures(2)), 409, digest_then)


def test_more_samples_than_the_limit_are_422_and_those_before_are_kept(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    small = settings.model_copy(update={"max_calibration_samples": 30})
    with TestClient(create_app(small)) as client:
        id, images = open_one(client), normal_pictures(40)
        add(client, id, images[:25])

        assert_problem(add(client, id, images), 422, "30 is the limit")

        assert client.get(f"/v1/calibrations/{id}").json()["samples"] == 25


def test_scores_of_another_engine_are_told(client: TestClient) -> None:
    id = open_one(client)
    add(client, id, normal_pictures(2))

    assert client.get(f"/v1/calibrations/{id}").json()["engines"] == [
        "CPUExecutionProvider in float32"
    ]


def test_metrics_tell_the_threshold_of_model_and_profiles(client: TestClient) -> None:
    model = calibrate(client, normal_pictures(40), target_fpr=0.05).json()
    left = calibrate(client, normal_pictures(25), target_fpr=0.05, profile="left").json()

    def told(name: str) -> dict[str, float]:
        lines = client.get("/metrics").text
        pattern = rf'skrd4ad_{name}{{model="part",profile="(\w*)"}} (\S+)'
        return {profile: float(value) for profile, value in re.findall(pattern, lines)}

    assert told("threshold") == {"": model["threshold"], "left": left["threshold"]}
    assert told("calibration_samples") == {"": 40, "left": 25}
    made = datetime.fromisoformat(left["finished"]).timestamp()
    assert told("calibration_made_timestamp_seconds")["left"] == pytest.approx(made, abs=1e-3)

    client.post("/v1/calibrations/deactivate?profile=left")
    assert told("threshold") == {"": model["threshold"]}

"""The report's page: what evaluate says, the pictures that it should show, and nothing else."""

import base64
import io
import json
import os
import re
import shutil
from dataclasses import asdict, fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, picture
from PIL import Image
from training_fixtures import write_picture

from service import heatmap
from service.image import digest
from training import checkpoint as checkpoints
from training.__main__ import main
from training.checkpoint import Checkpoint
from training.errors import TrainingError
from training.evaluate import evaluate
from training.metrics import ImageMetrics, PixelMetrics
from training.model import TeacherWeights
from training.report import IMAGE_METRICS, PIXEL_METRICS, percent, write_report
from training.settings import Settings

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags, table rows, pictures by alternative text, and visible words of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], "tags are left open"

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        if "style" in self._open:
            return
        self.words += text
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += text.strip()

    def row(self, heading: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row[0] == heading)
        return found

    def section(self, name: str) -> str:
        return self.source.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]

    def shown(self, name: str) -> list[str]:
        """The files of a gallery, in order."""
        return re.findall(r'<h3><bdi class="file">(.*?)</bdi>', self.section(name))

    def picture(self, alternative: str) -> Image.Image:
        (source,) = (a["src"] for t, a in self.tags if t == "img" and a["alt"] == alternative)
        return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))

    @property
    def text(self) -> str:
        return " ".join(self.words.replace("\N{NO-BREAK SPACE}", " ").split())


def spot(brightness: float) -> np.ndarray:
    pixels = picture(0.1)
    pixels[20:30, 30:50] = round(255 * brightness)
    return pixels


def mask() -> np.ndarray:
    drawn = np.zeros((64, 96), np.uint8)
    drawn[20:30, 30:50] = 255
    return drawn


@pytest.fixture
def labelled(tmp_path):
    """Five normal pictures, one too bright; six spots, three too faint; one found stain."""
    root = tmp_path / "data"
    for i, brightness in enumerate((0.1, 0.15, 0.5, 0.2, 0.12)):
        write_picture(root / f"test/good/{i}.png", picture(brightness))
    for i, brightness in enumerate((0.9, 0.28, 0.8, 0.2, 0.25, 0.7)):
        write_picture(root / f"test/spot/{i}.png", spot(brightness))
        write_picture(root / f"ground_truth/spot/{i}_mask.png", mask())
    write_picture(root / "test/stain/0.png", spot(0.6))
    write_picture(root / "ground_truth/stain/0.png", mask())
    return root


@pytest.fixture
def report(labelled, write_bundle, tmp_path):
    """Writes the report of the brightness bundle on `labelled` and reads it back."""

    def make(bundle=None, **options) -> Page:
        out = tmp_path / "out" / "report.html"
        folder = (bundle or write_bundle()).folder
        write_report(folder, labelled, out, device="cpu", **options)
        return Page(out)

    return make


def test_the_file_needs_nothing_but_itself(report):
    page = report()
    assert page.source.startswith("<!doctype html>")
    written = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|//|@import|url\(", written)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(name, "data:") or ""
            assert value.startswith(("data:image/", "data:", "#")), value
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(page.source) < 200_000


def test_every_picture_has_words_and_every_table_its_headings(report):
    page = report()
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in drawn)
    tables = re.findall(r"<table.*?</table>", page.source, flags=re.DOTALL)
    assert tables and all("<caption>" in one and 'scope="row"' in one for one in tables)


def test_figures_are_evaluates(report, labelled, write_bundle):
    bundle = write_bundle()
    page, expected = report(bundle), evaluate(bundle.folder, labelled, device="cpu")
    assert page.row("image AUROC")[0] == f"{expected.image.auroc:.4f}" == "0.9000"
    assert page.row("image AP")[0] == f"{expected.image.average_precision:.4f}"
    assert page.row("F1-max")[0] == f"{expected.image.f1_max:.4f}"
    assert page.row("pixel AUROC")[0] == f"{expected.pixel.auroc:.4f}"
    assert page.row("AUPRO@0.3")[0] == f"{expected.pixel.aupro:.4f}"
    assert page.row("defect regions")[0] == str(expected.pixel.regions) == "7"
    low, high = (f"{100 * x:.3g}" for x in expected.decisions.kinds["spot"].interval())
    interval = f"{low}\N{NO-BREAK SPACE}% to {high}\N{NO-BREAK SPACE}%"
    auroc = f"{expected.kind_auroc['spot']:.4f}"
    assert page.row("spot")[:5] == ["6", "3", "50\N{NO-BREAK SPACE}%", interval, auroc]
    assert page.row("stain")[:2] == ["1", "1"]
    assert page.row("all anomalous")[:2] == ["7", "4"]
    assert page.row("normal")[:3] == ["5", "1", "20\N{NO-BREAK SPACE}%"]
    assert page.row("count")[0] == "7"
    assert "finds 4 of 7 anomalous images and calls 1 of 5 normal ones" in page.text
    assert bundle.digest in page.text and "threshold 0.3" in page.text


def test_every_figure_of_evaluate_has_its_line():
    assert {field.name for field in fields(ImageMetrics)} <= set(IMAGE_METRICS)
    assert {field.name for field in fields(PixelMetrics)} <= set(PIXEL_METRICS)


def test_the_area_under_each_curve_is_the_figure_beside_it(report, labelled, write_bundle):
    bundle = write_bundle()
    page, expected = report(bundle), evaluate(bundle.folder, labelled, device="cpu")
    curves = [
        np.array([point.split(",") for point in attributes["points"].split()], float)
        for tag, attributes in page.tags
        if tag == "polyline"
    ]
    areas = [
        np.trapezoid(1 - curve[:, 1] / 210, curve[:, 0] / 290) for curve in curves
    ]  # the plot is 290 x 210
    assert areas == pytest.approx(
        [expected.image.auroc, expected.image.average_precision], abs=2e-3
    )
    dots = [(a["cx"], a["cy"]) for t, a in page.tags if t == "circle"]
    assert dots[0] == ("58.0", "90.0")  # a fifth to the right, four sevenths up


def test_the_worst_misses_come_first_and_found_images_never(report):
    page = report()
    assert page.shown("misses") == ["test/spot/3.png", "test/spot/4.png", "test/spot/1.png"]
    assert page.shown("false-alarms") == ["test/good/2.png"]
    assert "Below the threshold: 3 of 7 anomalous images. The" in page.text


def test_no_more_are_shown_than_asked_for(report):
    page = report(worst=2)
    assert page.shown("misses") == ["test/spot/3.png", "test/spot/4.png"]
    assert "Below the threshold: 3 of 7 anomalous images, of which 2 are shown." in page.text


def test_a_case_has_its_score_p_value_outline_and_the_services_heatmap(report, write_bundle):
    bundle = write_bundle()
    page = report(bundle)
    score = 51 / 255  # of the faintest spot, on a ground of 26 / 255
    threshold = bundle.default_calibration().threshold
    card = page.section("misses").split("<article")[1]
    shown = re.findall(r"<dd>(.*?)</dd>", card)
    p_value = bundle.default_calibration().p_value(score)
    assert shown == [f"{score:.4g}", f"{score / threshold:.3g} ×", f"{p_value:.4g}"]
    assert 'class="defect" d="M30,20 30,29 49,29 49,20Z"' in card
    assert 'class="found"' not in card  # nothing reaches the threshold

    alternative = next(
        a["alt"] for t, a in page.tags if t == "img" and a["alt"].startswith("Its heatmap")
    )
    assert alternative == "Its heatmap, highest 31.2\N{NO-BREAK SPACE}% from the left and " + (
        "31.2\N{NO-BREAK SPACE}% from the top"
    )
    expected_map = (spot(0.2).mean(axis=2) / 255).astype(np.float32)
    expected = Image.open(io.BytesIO(heatmap.heatmap(expected_map, threshold)))
    heatmaps = [a["src"] for t, a in page.tags if t == "img" and "heatmap," in a["alt"]]
    first = Image.open(io.BytesIO(base64.b64decode(heatmaps[0].split(",")[1])))
    assert np.array_equal(np.asarray(first.convert("RGB")), np.asarray(expected.convert("RGB")))

    alarm = page.section("false-alarms").split("<article")[1]
    assert 'class="found"' in alarm and 'class="defect"' not in alarm


def test_pictures_are_small_and_keep_their_proportions(report, labelled):
    large = np.repeat(np.repeat(spot(0.2), 20, axis=0), 10, axis=1)  # 1280 high, 960 wide
    write_picture(labelled / "test/spot/large.png", large)
    page = report()
    assert page.picture("Picture test/spot/large.png").size == (240, 320)
    assert page.picture("Picture test/spot/3.png").size == (96, 64)  # never enlarged


def test_hostile_names_are_text(report, labelled):
    name = """<img src=x onerror=alert(1)>&"'{{7*7}}"""
    pixels = encoded(spot(0.2))
    (labelled / f"test/{name}").mkdir()
    (labelled / f"test/{name}" / f"{name}.png").write_bytes(pixels)
    (labelled / f"test/{name}" / "broken\u202e.png").write_bytes(b"<script>")
    page = report()
    assert f"test/{name}/{name}.png" in page.words
    assert page.row(name)[:2] == ["1", "0"]
    assert page.row(f"test/{name}/broken\u202e.png")  # among the unreadable ones
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert all(a["src"].startswith("data:") for t, a in page.tags if t == "img")
    assert "<script" not in page.source


def test_a_name_that_is_no_utf8_is_spelled_out(report, labelled):
    os.mkdir(os.fsencode(labelled) + b"/test/odd")
    Path(os.fsdecode(os.fsencode(labelled) + b"/test/odd/\xff.png")).write_bytes(encoded(spot(0.2)))
    assert "test/odd/\\udcff.png" in report().words


def test_without_masks_it_says_so(report, labelled):
    for path in (labelled / "ground_truth").rglob("*.png"):
        path.unlink()
    page = report()
    assert "no figures on pixels" in page.text and "pixel AUROC" not in page.text
    assert page.row("no file")[0] == "7" and "test/spot/0.png" in page.row("no file")[1]
    assert "No outline: no mask." in page.text and 'class="defect" d="M30' not in page.source


def test_masks_and_files_that_are_left_out_are_named(report, labelled, write_bundle):
    bundle = write_bundle()
    write_picture(labelled / "ground_truth/spot/3_mask.png", np.zeros((64, 96), np.uint8))
    (labelled / "test/stain/1.png").write_bytes(b"no picture")
    page = report(bundle)
    assert page.row("empty") == ["1", "test/spot/3.png"] and page.row("count")[0] == "6"
    assert "No outline: the mask is empty." in page.text
    assert "not an image" in page.row("test/stain/1.png")[0]
    assert "could not be read and count nowhere: 1" in page.text
    with pytest.raises(TrainingError, match="test/stain/1.png"):
        report(bundle, strict=True)


def test_where_all_is_decided_rightly_the_closest_calls_are_shown(report, labelled):
    for faint in (1, 3, 4):
        (labelled / f"test/spot/{faint}.png").unlink()
    (labelled / "test/good/2.png").unlink()
    page = report()
    assert "Misses: none" in page.text and "False alarms: none" in page.text
    assert page.shown("misses")[:2] == ["test/stain/0.png", "test/spot/5.png"]
    assert page.shown("false-alarms") == [f"test/good/{i}.png" for i in (3, 1, 4, 0)]


def test_where_nothing_reaches_the_threshold_there_is_no_precision(report, labelled):
    for path in (labelled / "test").rglob("*.png"):
        brightness = 0.1 if "good" in path.parts else 0.15
        write_picture(path, picture(brightness))
    page = report()
    assert "No image reaches the threshold" in page.text
    assert "finds 0 of 7 anomalous images" in page.text


@pytest.mark.parametrize(
    "held_out, word",
    [
        ((0.3,), "promise kept"),  # one picture promises a half; none of 13 alarms
        ((0.3,) * 99, "does not disprove the promise"),
        ((0.05,) * 99, "promise broken"),  # every normal test picture is brighter
    ],
)
def test_the_promise_is_held_against_the_interval(report, labelled, write_bundle, held_out, word):
    (labelled / "test/good/2.png").unlink()
    for i in range(9):
        write_picture(labelled / f"test/good/more{i}.png", picture(0.1))
    assert word in report(write_bundle(scores=held_out)).text


@pytest.mark.parametrize(
    "share, text",
    [(0, "0"), (1, "100"), (1 / 6, "16.7"), (0.0087, "0.87"), (0.99982, "99.98"), (1 / 3, "33.3")],
)
def test_a_share_below_one_is_never_100_percent(share, text):
    assert percent(share) == f"{text}\N{NO-BREAK SPACE}%"


def test_images_that_the_model_knows_are_a_caution(report, labelled, write_bundle):
    assert "trained on or held out:" not in report().text
    known = digest((labelled / "test/good/0.png").read_bytes())
    bundle = write_bundle(version=2, scores=(0.1, 0.3), digests=(known, "0" * 64))
    assert "trained on or held out: 1." in report(bundle).text


def write_run(bundle, **changes) -> Path:
    """A run's record beside a bundle, as the one that the bundle came from."""
    record = bundle.manifest
    run = Checkpoint(
        settings=Settings(data="data", name="part"),
        teacher=TeacherWeights(**record.teacher.model_dump()),
        trained={},
        held_out={},
        data_fingerprint=record.data.fingerprint,
        step=3,
        steps_per_epoch=1,
        losses=[0.9, 0.5, record.metrics["loss"]],
    )
    folder = bundle.folder.parent / "checkpoint"
    folder.mkdir()
    content = {"format": checkpoints.FORMAT} | asdict(run) | changes
    (folder / "checkpoint.json").write_text(json.dumps(content))
    return folder / "checkpoint.json"


@pytest.fixture
def trained(write_bundle):
    """A bundle of the third epoch, whose loss is no round number."""
    bundle = write_bundle()
    path = bundle.folder / "manifest.json"
    record = json.loads(path.read_text()) | {"metrics": {"epochs": 3, "loss": 0.1 + 0.2}}
    path.write_text(json.dumps(record))
    return type(bundle)(bundle.folder)


def test_the_loss_curve_is_that_of_the_bundles_own_run(report, trained):
    write_run(trained)
    page = report(trained)
    assert "From 0.9 in the first epoch to 0.3 in epoch 3" in page.text
    assert "went on" not in page.text and page.source.count("<polyline") == 3


def test_a_run_that_went_on_after_the_export_is_still_the_bundles(report, trained):
    write_run(trained, losses=[0.9, 0.5, 0.1 + 0.2, 0.2, 0.1])
    page = report(trained)
    assert "to 0.3 in epoch 3" in page.text and "went on to epoch 5" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": [0.9, 0.5, 0.3]},  # a last bit away from 0.1 + 0.2
        {"losses": [0.1 + 0.2]},
        {"losses": []},
        {"data_fingerprint": "2" * 64},
        {"teacher": {"origin": "test", "sha256": "2" * 64, "licence": ""}},
    ],
    ids=["loss", "fewer epochs", "no epoch", "data", "teacher"],
)
def test_another_runs_loss_is_not_shown(report, trained, changes):
    write_run(trained, **changes)
    page = report(trained)
    assert "is another one" in page.text and page.source.count("<polyline") == 2


def test_without_a_run_or_with_a_damaged_one_there_is_no_curve(report, trained):
    assert "no training run beside the bundle" in report(trained).text
    write_run(trained).write_text("{")
    assert "no training run beside the bundle" in report(trained).text


def test_what_it_takes_to_repeat_it_is_there(report, labelled, trained, tmp_path):
    page = report(trained, worst=3)
    command = f"report --bundle {trained.folder} --data {labelled} --out {tmp_path}/out/report.html"
    assert f"{command} --device cpu --worst 3" in page.text
    manifest = trained.manifest
    for text in (manifest.graph.sha256, manifest.teacher.sha256, manifest.data.fingerprint):
        assert text in page.text
    assert page.row("embedding planes") == ["512"] and page.row("device") == ["cpu in float32"]
    again = Page(tmp_path / "out" / "report.html").row("fingerprint of those tested on")
    (labelled / "test/good/0.png").unlink()
    assert report(trained).row("fingerprint of those tested on") != again


def test_the_command_line_writes_beside_you_and_prints_the_table(
    labelled, write_bundle, tmp_path, monkeypatch, capsys
):
    folder = write_bundle().folder
    monkeypatch.chdir(tmp_path)
    argv = ["report", "--bundle", str(folder), "--data", str(labelled), "--device", "cpu"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "image AUROC 0.9000" in printed and "wrote part-1.html: " in printed
    assert "part, version 1" in Page(tmp_path / "part-1.html").text


def test_one_category_of_several_is_reported_on(report, labelled):
    shutil.rmtree(labelled)
    for category in ("nut", "bolt"):
        write_picture(labelled / category / "train/good/0.png", picture(0.1))
        write_picture(labelled / category / "test/good/only.png", picture(0.1))
        write_picture(labelled / category / "test/spot/only.png", spot(0.9))
    page = report(category="bolt", layout="mvtec")
    assert "finds 1 of 1 anomalous images" in page.text
    assert "--category bolt --layout mvtec" in page.text
    assert page.shown("false-alarms") == ["bolt/test/good/only.png"]


def test_an_existing_file_is_replaced_whole_or_not_at_all(report, labelled, write_bundle, tmp_path):
    bundle, out = write_bundle(), tmp_path / "out" / "report.html"
    out.parent.mkdir()
    out.write_text("the last one" * 100_000)
    good = (labelled / "test/good/0.png").read_bytes()
    (labelled / "test/good/0.png").write_bytes(b"no picture")
    with pytest.raises(TrainingError):
        report(bundle, strict=True)
    assert out.read_text() == "the last one" * 100_000
    (labelled / "test/good/0.png").write_bytes(good)
    page = report(bundle)
    assert "the last one" not in page.source and page.source.rstrip().endswith("</html>")
    assert os.listdir(out.parent) == ["report.html"]


@pytest.mark.parametrize("out", ["folder", "file/report.html", "folder/" + "x" * 300 + ".html"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_scored(
    labelled, write_bundle, tmp_path, capsys, out
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    argv = ["report", "--bundle", str(write_bundle().folder), "--data", str(labelled)]
    assert main([*argv, "--out", str(tmp_path / out)]) == 1
    errors = capsys.readouterr().err
    assert f"error: --out {tmp_path / out}" in errors and "scoring" not in errors


def test_bad_folders_are_refused(labelled, write_bundle, tmp_path, capsys):
    folder = write_bundle().folder
    assert main(["report", "--bundle", str(tmp_path / "no"), "--data", str(labelled)]) == 1
    assert "no/manifest.json" in capsys.readouterr().err
    assert main(["report", "--bundle", str(folder), "--data", str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not list(Path().glob("part-1.html"))

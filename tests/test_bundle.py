"""The immutable folder, and every way in which one can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import brightness_graph, encoded, golden_of, manifest_of, picture

from service import bundle as bundles
from service.bundle import Bundle, HeldOutImage
from service.errors import BundleError
from service.image import digest

Write = Callable[..., Bundle]


def edit_manifest(bundle: Bundle, **changes: object) -> None:
    path = bundle.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_is_read_back(write_bundle: Write) -> None:
    bundle = write_bundle(name="washer", version=3)

    assert (bundle.name, bundle.version) == ("washer", 3)
    assert bundle.read_graph() == brightness_graph()
    assert bundle.manifest == manifest_of(brightness_graph(), name="washer", version=3)


def test_the_default_threshold_comes_from_the_held_out_scores(write_bundle: Write) -> None:
    calibration = write_bundle(scores=(0.2, 0.4, 0.1)).default_calibration()

    assert calibration.target_fpr == pytest.approx(1 / 4)
    assert 0.4 < calibration.threshold < 0.4001


def test_a_changed_graph_is_refused_with_both_digests(write_bundle: Write) -> None:
    bundle = write_bundle()
    path = bundle.folder / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(BundleError, match=rf"model.onnx: SHA-256 is .*{bundle.digest}"):
        bundle.read_graph()


@pytest.mark.parametrize("file", ["model.onnx", "manifest.json"])
def test_a_missing_file_is_named(write_bundle: Write, file: str) -> None:
    bundle = write_bundle()
    (bundle.folder / file).unlink()

    with pytest.raises(BundleError, match=f"{file}: No such file"):
        Bundle(bundle.folder).read_graph()


def test_a_folder_of_versions_says_which_there_are(write_bundle: Write) -> None:
    write_bundle()
    folder = write_bundle(version=12).folder.parent
    with pytest.raises(BundleError, match=r"part: is a model of versions 1, 12; .*part/12"):
        Bundle(folder)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"format": 2}, "format"),
        ({"image_size": [250, 256]}, "image_size"),
        ({"name": "../escape"}, "name"),
        ({"version": 0}, "version"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_its_name(
    write_bundle: Write, change: dict[str, object], where: str
) -> None:
    bundle = write_bundle()
    edit_manifest(bundle, **change)

    with pytest.raises(BundleError, match=rf"manifest.json: {where}"):
        Bundle(bundle.folder)


def test_a_manifest_that_is_no_json_is_refused(write_bundle: Write) -> None:
    bundle = write_bundle()
    (bundle.folder / "manifest.json").write_text("{")

    with pytest.raises(BundleError, match="manifest.json: the file: Invalid JSON"):
        Bundle(bundle.folder)


def test_a_bundle_without_held_out_images_has_no_threshold(write_bundle: Write) -> None:
    assert write_bundle(scores=()).default_calibration() is None


def test_a_bundle_is_never_overwritten(write_bundle: Write) -> None:
    write_bundle()

    with pytest.raises(BundleError, match="never overwritten"):
        write_bundle()


def test_a_bundle_from_before_precisions_computes_in_float32(write_bundle: Write) -> None:
    bundle = write_bundle()
    path = bundle.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["graph"]["precision"]
    path.write_text(json.dumps(manifest))

    assert Bundle(bundle.folder).manifest.graph.precision == "float32"


def test_a_golden_picture_is_read_back_pixel_for_pixel(write_bundle: Write) -> None:
    bundle = write_bundle(golden=golden_of(0.4))

    pixels = bundle.golden_pixels()

    assert pixels is not None and (pixels == picture(0.4)).all()
    assert sorted(path.name for path in bundle.folder.iterdir()) == [
        "golden.png",
        "manifest.json",
        "model.onnx",
    ]


def test_a_bundle_from_before_golden_pictures_has_none(write_bundle: Write) -> None:
    bundle = write_bundle()
    path = bundle.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["golden"]
    path.write_text(json.dumps(manifest))

    assert Bundle(bundle.folder).golden_pixels() is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no picture", "10 bytes are not an image"),
        (encoded(picture(size=(32, 32))), r"\(32, 32\), the model's is \(64, 96\)"),
    ],
)
def test_a_golden_picture_that_is_none_or_of_another_size_is_refused(
    write_bundle: Write, data: bytes, says: str
) -> None:
    golden = golden_of()[0].model_copy(update={"sha256": digest(data)})

    with pytest.raises(BundleError, match=f"golden.png: .*({says})"):
        write_bundle(golden=(golden, data)).golden_pixels()


def test_a_changed_or_missing_golden_picture_is_refused(write_bundle: Write) -> None:
    bundle = write_bundle(golden=golden_of())
    path = bundle.folder / "golden.png"
    path.write_bytes(encoded(picture(0.3)))

    with pytest.raises(BundleError, match=r"golden.png: SHA-256 is .*the manifest says"):
        bundle.golden_pixels()
    path.unlink()
    with pytest.raises(BundleError, match="golden.png: No such file"):
        bundle.golden_pixels()


def test_what_is_staged_is_no_version_before_it_is_published(tmp_path: Path) -> None:
    graph, target = brightness_graph(), tmp_path / "part" / "1"

    staging = bundles.stage(target, manifest_of(graph), graph)
    assert bundles.versions(tmp_path, "part") == [] and Bundle(staging).read_graph() == graph
    bundles.publish(staging, target)

    assert bundles.versions(tmp_path, "part") == [1]


def test_of_two_who_write_the_same_version_the_second_is_refused(tmp_path: Path) -> None:
    graph, target = brightness_graph(), tmp_path / "part" / "1"
    first, second = (bundles.stage(target, manifest_of(graph), graph) for _ in range(2))

    bundles.publish(first, target)

    with pytest.raises(BundleError, match="never overwritten"):
        bundles.publish(second, target)


def test_versions_are_the_folders_named_as_integers(write_bundle: Write, tmp_path: Path) -> None:
    for version in (2, 10, 1):
        write_bundle(version=version)
    for stranger in ("checkpoint", ".4.partial", "07"):
        (tmp_path / "models" / "part" / stranger).mkdir()
    (tmp_path / "models" / "teachers").mkdir()

    assert bundles.versions(tmp_path / "models", "part") == [1, 2, 10]
    assert bundles.names(tmp_path / "models") == ["part"]


def test_the_folder_of_one_model_is_not_taken_for_that_of_all(
    write_bundle: Write, tmp_path: Path
) -> None:
    write_bundle()

    with pytest.raises(BundleError, match="is the folder of one model; give the one above"):
        bundles.names(tmp_path / "models" / "part")


def test_a_models_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: No such file"):
        bundles.names(tmp_path / "nowhere")


def test_a_bundle_that_could_not_be_read_back_is_not_written(
    write_bundle: Write, tmp_path: Path
) -> None:
    """A file name that is no UTF-8 makes JSON that nobody reads: it would stop every start."""
    bundle = write_bundle()
    images = [HeldOutImage(file="t\udce9le.png", sha256="0" * 64, score=0.1)]
    data = bundle.manifest.data.model_copy(update={"held_out": images})
    manifest = bundle.manifest.model_copy(update={"data": data, "version": 2})

    with pytest.raises(BundleError, match="manifest.json"):
        bundles.write(tmp_path / "part" / "2", manifest, bundle.read_graph())

    assert list((tmp_path / "part").iterdir()) == []

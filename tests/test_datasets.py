"""The field's data sets in their own layouts: which picture is normal, which is a defect of what.

Every tree here has the folders, names and endings of the real one.
"""

import csv
import random

import numpy as np
import pytest
from training_fixtures import write_picture

from training import data, datasets, settings
from training.errors import TrainingError

BLACK = np.zeros((8, 8, 3), np.uint8)


def pictures(root, *names):
    for name in names:
        write_picture(root / name, BLACK)


def below(root, paths):
    return [p.relative_to(root).as_posix() for p in paths]


def labels(category):
    """{path: (kind, path of the mask)}, all below the root."""
    return {
        t.path.relative_to(category.root).as_posix(): (
            t.kind,
            t.mask and t.mask.relative_to(category.root).as_posix(),
        )
        for t in category.to_test_on()
    }


def test_every_layout_can_be_asked_for():
    assert ("auto", *datasets.LAYOUTS) == settings.LAYOUTS
    assert set(datasets.AUTO) < set(datasets.LAYOUTS)


# MVTec AD


@pytest.fixture
def mvtec(tmp_path):
    """Two categories beside the files that the archive brings along."""
    pictures(tmp_path, "bottle/train/good/001.png", "bottle/train/good/000.png")
    pictures(tmp_path, "bottle/test/good/000.png", "bottle/test/broken_large/000.png")
    pictures(tmp_path, "bottle/ground_truth/broken_large/000_mask.png")
    pictures(tmp_path, "cable/train/good/000.png", "cable/test/good/000.png")
    for name in ("license.txt", "readme.txt", "bottle/readme.txt"):
        (tmp_path / name).write_text("text")
    return tmp_path


def test_mvtec_is_read_by_category(mvtec):
    assert datasets.categories(mvtec) == ["bottle", "cable"]
    bottle = datasets.read(mvtec, category="bottle")
    assert (bottle.layout, bottle.name, bottle.root) == ("mvtec", "bottle", mvtec)
    normal = ["bottle/train/good/000.png", "bottle/train/good/001.png"]
    assert below(mvtec, bottle.to_train_on()) == normal
    assert labels(bottle) == {
        "bottle/test/broken_large/000.png": (
            "broken_large",
            "bottle/ground_truth/broken_large/000_mask.png",
        ),
        "bottle/test/good/000.png": ("good", None),
    }


def test_a_category_folder_itself_is_read_without_a_name(mvtec):
    assert datasets.categories(mvtec / "bottle") == [""]
    bottle = datasets.read(mvtec / "bottle")
    assert below(bottle.root, bottle.to_train_on()) == ["train/good/000.png", "train/good/001.png"]


def test_a_category_must_be_chosen_where_there_are_several_and_exist(mvtec):
    with pytest.raises(TrainingError, match="needs --category; it holds bottle, cable"):
        datasets.read(mvtec)
    with pytest.raises(TrainingError, match="has no category screw; it holds bottle, cable"):
        datasets.read(mvtec, category="screw")
    with pytest.raises(TrainingError, match="bottle: has no category bottle: .* it is one itself"):
        datasets.read(mvtec / "bottle", category="bottle")


def test_masks_are_found_by_stem_whatever_their_ending(tmp_path):
    pictures(tmp_path, "test/good/000.png", "ground_truth/good/000.png", "test/scratch/000.png")
    for image, mask in (("000.png", "000_mask.png"), ("001.jpg", "001.png"), ("2.bmp", "2.BMP")):
        pictures(tmp_path, f"test/hole/{image}", f"ground_truth/hole/{mask}")
    assert labels(datasets.read(tmp_path)) == {
        "test/good/000.png": ("good", None),
        "test/hole/000.png": ("hole", "ground_truth/hole/000_mask.png"),
        "test/hole/001.jpg": ("hole", "ground_truth/hole/001.png"),
        "test/hole/2.bmp": ("hole", "ground_truth/hole/2.BMP"),
        "test/scratch/000.png": ("scratch", None),
    }


@pytest.mark.parametrize(
    "made", ["train/good/a.png", "test/good/a.png", "test/hole/a.png", "test/a.png"]
)
def test_to_test_on_needs_normal_and_anomalous_images(tmp_path, made):
    pictures(tmp_path, made)
    with pytest.raises(TrainingError, match="labelled test images: test/good and test/<defect>"):
        datasets.read(tmp_path).to_test_on()


# VAD


@pytest.fixture
def vad(tmp_path):
    """One category, no masks, and defects among the training images."""
    for name in ("train/good", "train/bad", "test/good", "test/bad", "test/bad_unseen_defects"):
        pictures(tmp_path, f"vad/{name}/0001.png", f"vad/{name}/0002.png")
    (tmp_path / "vad/low_shot_train.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("layout", ["auto", "vad"])
def test_vad_never_trains_on_its_bad_images(vad, layout):
    category = datasets.read(vad, layout)
    assert below(vad, category.to_train_on()) == [f"vad/train/good/000{i}.png" for i in (1, 2)]
    assert labels(category) == {
        f"vad/test/{kind}/000{i}.png": (kind, None)
        for kind in ("bad", "bad_unseen_defects", "good")
        for i in (1, 2)
    }
    assert datasets.read(vad / "vad", layout).normal == category.normal


# VisA


def write_visa(root):
    """Upper-case .JPG images, masks of class indices, and a list that says who is who."""
    rows = []
    for name in ("candle", "pcb1"):
        for i, split in enumerate(("train", "train", "test")):
            image = f"{name}/Data/Images/Normal/{i:04}.JPG"
            pictures(root, image)
            rows.append((name, split, "normal", image, ""))
        for i in range(2):
            image = f"{name}/Data/Images/Anomaly/{i:03}.JPG"
            mask = np.zeros((8, 8), np.uint8)
            mask[2:4, 2:6] = i + 1  # the defect's class, invisible to the eye
            write_picture(root / f"{name}/Data/Masks/Anomaly/{i:03}.png", mask)
            pictures(root, image)
            rows.append((name, "test", "anomaly", image, f"{name}/Data/Masks/Anomaly/{i:03}.png"))
        (root / name / "image_anno.csv").write_text("image,label,mask\n")
    (root / "split_csv").mkdir()
    for name in ("1cls.csv", "2cls_fewshot.csv"):
        with open(root / "split_csv" / name, "w", newline="") as file:
            csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return root


@pytest.mark.parametrize("layout", ["auto", "visa"])
def test_visa_is_read_by_its_own_one_class_split(tmp_path, layout):
    root = write_visa(tmp_path)
    assert datasets.categories(root, layout) == ["candle", "pcb1"]
    candle = datasets.read(root, layout, "candle")
    normal = [f"candle/Data/Images/Normal/000{i}.JPG" for i in (0, 1)]
    assert below(root, candle.to_train_on()) == normal
    assert labels(candle) == {
        "candle/Data/Images/Normal/0002.JPG": ("good", None),
        "candle/Data/Images/Anomaly/000.JPG": ("anomaly", "candle/Data/Masks/Anomaly/000.png"),
        "candle/Data/Images/Anomaly/001.JPG": ("anomaly", "candle/Data/Masks/Anomaly/001.png"),
    }


def test_visas_class_indices_are_defects(tmp_path):
    candle = datasets.read(write_visa(tmp_path), category="candle")
    for test in candle.to_test_on():
        if test.mask:
            stored, small = data.read_mask(test.mask, (8, 8))
            assert stored.sum() == small.sum() == 8


def test_a_visa_mask_that_is_not_there_is_none(tmp_path):
    root = write_visa(tmp_path)
    (root / "candle/Data/Masks/Anomaly/000.png").unlink()
    masks = [mask for _, mask in labels(datasets.read(root, category="candle")).values()]
    assert masks.count("candle/Data/Masks/Anomaly/001.png") == 1 and masks.count(None) == 2


def test_a_visa_split_without_its_columns_is_an_error_that_names_them(tmp_path):
    root = write_visa(tmp_path)
    (root / "split_csv/1cls.csv").write_text("object,split\ncandle,train\n")
    with pytest.raises(TrainingError, match=r"1cls\.csv: needs columns image, label, mask, object"):
        datasets.read(root)


# BTAD


@pytest.mark.parametrize("layout", ["auto", "btad"])
@pytest.mark.parametrize(
    "category, ending, mask_ending",
    [("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")],
)
def test_btad_calls_them_ok_and_ko_in_several_formats(
    tmp_path, layout, category, ending, mask_ending
):
    root = tmp_path / "BTech_Dataset_transformed"
    for name in ("01", "02", "03"):
        pictures(root, *(f"{name}/{part}/0000.{ending}" for part in ("train/ok", "test/ok")))
        pictures(
            root, f"{name}/test/ko/0020.{ending}", f"{name}/ground_truth/ko/0020.{mask_ending}"
        )
    assert datasets.categories(root, layout) == ["01", "02", "03"]
    for found in (
        datasets.read(root, layout, category),
        datasets.read(root / category, layout),
    ):
        start = f"{found.name}/" if found.name else ""
        assert below(found.root, found.to_train_on()) == [f"{start}train/ok/0000.{ending}"]
        assert labels(found) == {
            f"{start}test/ko/0020.{ending}": ("ko", f"{start}ground_truth/ko/0020.{mask_ending}"),
            f"{start}test/ok/0000.{ending}": ("good", None),
        }


# Magnetic tiles


def write_tiles(root, count=30):
    """Tiles of one to six exposures each, 15 frames apart, and next tiles nearby or far away."""
    rng = random.Random(1)
    frame, shown = 700, {}
    for tile in range(count):
        exposures = sorted(rng.sample(range(1, 7), rng.randint(1, 6)))
        for exposure in exposures:
            frame += 15
            name = f"MT_Free/Imgs/exp{exposure}_num_{frame}"
            pictures(root, f"{name}.jpg", f"{name}.png")  # normal images have empty masks
            shown[f"{name}.jpg"] = tile
        frame += 1000 if tile % 2 or exposures[-1] < 6 else 15
    mask = np.zeros((8, 8), np.uint8)
    mask[0, :3] = (1, 80, 255)  # soft: whatever is not zero counts
    for kind in ("Blowhole", "Break", "Crack", "Fray", "Uneven"):
        pictures(root, f"MT_{kind}/Imgs/exp1_num_4727.jpg")
        write_picture(root / f"MT_{kind}/Imgs/exp1_num_4727.png", mask)
    (root / "README.md").write_text("text")
    return shown


def test_frames_of_one_tile_are_told_by_rising_exposures(tmp_path):
    shown = write_tiles(tmp_path)
    found = datasets.tiles([tmp_path / name for name in shown])
    assert {name: int(found[tmp_path / name]) for name in shown} == shown


def test_a_tile_with_another_name_is_an_error_that_names_it(tmp_path):
    write_tiles(tmp_path)
    pictures(tmp_path, "MT_Free/Imgs/new.jpg")
    with pytest.raises(TrainingError, match=r"new\.jpg: not named exp<exposure>_num_<frame>"):
        datasets.read(tmp_path)


@pytest.mark.parametrize("layout", ["auto", "mtd"])
def test_no_tile_is_on_both_sides_of_the_split_nor_held_out_in_part(tmp_path, layout):
    shown = write_tiles(tmp_path)
    category = datasets.read(tmp_path, layout)
    normal = below(tmp_path, category.to_train_on())
    test = [name for name, (kind, _) in labels(category).items() if kind == "good"]
    assert sorted(normal + test) == sorted(shown)
    assert 0.2 * len(shown) - 1 <= len(test) < 0.2 * len(shown) + 6
    assert not {shown[name] for name in normal} & {shown[name] for name in test}

    groups = category.groups("")
    trained, held_out = data.hold_out(
        len(normal), 0, [groups[path] for path in category.to_train_on()]
    )
    assert not {shown[normal[i]] for i in trained} & {shown[normal[i]] for i in held_out}


def test_the_random_split_of_tiles_is_had_by_name_and_is_the_literatures(tmp_path):
    shown = write_tiles(tmp_path)
    category = datasets.read(tmp_path, "mtd-random")
    expected = sorted(shown)
    random.Random(0).shuffle(expected)
    count = int(0.8 * len(shown))
    assert sorted(below(tmp_path, category.to_train_on())) == sorted(expected[:count])
    assert category.groups("") == {}


@pytest.mark.parametrize("layout", ["mtd", "mtd-random"])
def test_tile_defects_have_their_soft_masks_beside_them(tmp_path, layout):
    write_tiles(tmp_path)
    category = datasets.read(tmp_path, layout)
    anomalous = {name: test for name, test in labels(category).items() if test[0] != "good"}
    assert anomalous == {
        f"MT_{kind}/Imgs/exp1_num_4727.jpg": (kind.lower(), f"MT_{kind}/Imgs/exp1_num_4727.png")
        for kind in ("Blowhole", "Break", "Crack", "Fray", "Uneven")
    }
    stored, _ = data.read_mask(tmp_path / "MT_Fray/Imgs/exp1_num_4727.png", (8, 8))
    assert stored.sum() == 3
    assert all(t.mask is None for t in category.tests if not t.anomalous)


# Any other folder


def test_any_other_folder_is_taken_whole_with_its_subfolders(tmp_path):
    pictures(tmp_path, "one.png", "line 2/two.png", "line 2/tray/three.png")
    category = datasets.read(tmp_path)
    assert (category.layout, category.name) == ("folder", "")
    expected = ["line 2/tray/three.png", "line 2/two.png", "one.png"]
    assert below(tmp_path, category.to_train_on()) == expected
    with pytest.raises(TrainingError, match="needs labelled test images"):
        category.to_test_on()


@pytest.mark.parametrize(
    "folders, named",
    [
        (("good", "scratched"), "good beside others"),
        (("Normal", "anomalous"), "Normal beside others|anomalous"),
        (("day 1", "day 1/NG"), "day 1/NG"),
        (("bad",), "bad"),
        (("Defects",), "Defects"),
        (("inner/test/hole",), "inner/test"),
    ],
)
def test_a_folder_that_seems_to_hold_defects_is_not_taken_for_normal(tmp_path, folders, named):
    pictures(tmp_path, "loose.png", *(f"{folder}/a.png" for folder in folders))
    with pytest.raises(TrainingError, match=f"plain folder.*holds ({named}).*--layout folder if"):
        datasets.read(tmp_path)
    assert datasets.read(tmp_path, "folder").to_train_on()


def test_links_to_folders_are_followed_once_and_dangling_ones_are_left_to_be_named(tmp_path):
    """Pictures of a line often lie on a share; one that isn't mounted must not shrink the set."""
    pictures(tmp_path, "here/a.png", "share/b.png", "other/bad/c.png")
    (tmp_path / "here" / "day 2").symlink_to(tmp_path / "share")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "gone.png").symlink_to(tmp_path / "unmounted.png")
    found = datasets.read(tmp_path / "here").to_train_on()
    assert below(tmp_path / "here", found) == ["a.png", "day 2/b.png", "gone.png"]
    (tmp_path / "here" / "more").symlink_to(tmp_path / "other")
    with pytest.raises(TrainingError, match="holds more/bad"):
        datasets.read(tmp_path / "here")


def test_a_folder_is_taken_whole_where_that_is_asked_for(mvtec):
    assert len(datasets.read(mvtec, "folder").to_train_on()) == 7


def test_images_count_by_suffix_in_any_case_and_hidden_files_do_not(tmp_path):
    yes = ["a.jpg", "b.JPEG", "c.png", "d.Bmp", "e.tif", "f.TIFF", "g.webp"]
    no = [".a.jpg", "._c.png", "Thumbs.db", "notes.txt", "g.gif", "png", "h.png.json"]
    for name in yes + no:
        (tmp_path / name).write_bytes(b"whatever")
    (tmp_path / "folder.png").mkdir()
    assert below(tmp_path, datasets.find_images(tmp_path)) == sorted(yes)


@pytest.mark.parametrize(
    "made, message",
    [
        (None, "no such folder"),
        ("data/notes/readme.txt", "data: no images"),
        ("data/train/bad/a.png", "train/good: no images"),
        ("data/train/good/readme.txt", "train/good: no images"),
        ("data/test/good/a.png", "train/good: no images"),
        ("data/ground_truth/hole/a.png", "train/good: no images"),
    ],
)
def test_a_folder_without_normal_images_is_an_error_that_names_it(tmp_path, made, message):
    if made:
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).write_bytes(b"")
    with pytest.raises(TrainingError, match=message) as caught:
        datasets.read(tmp_path / "data").to_train_on()
    assert str(tmp_path / "data") in str(caught.value)


@pytest.mark.parametrize("layout", ["visa", "btad", "mtd", "mvtec"])
def test_a_folder_in_another_layout_than_the_one_asked_for_is_an_error(tmp_path, layout):
    pictures(tmp_path, "one.png")
    with pytest.raises(TrainingError, match=f"not in layout {layout}: no "):
        datasets.read(tmp_path, layout)


def test_a_layout_that_is_none_is_an_error_that_lists_them(tmp_path):
    with pytest.raises(
        TrainingError, match="--layout coco: must be one of auto, mvtec, visa, btad"
    ):
        datasets.read(tmp_path, "coco")


# Groups


def test_groups_are_what_the_patterns_first_parenthesis_matches(tmp_path):
    pictures(tmp_path, "day1/part7_a.png", "day1/part7_b.png", "day2/part7_a.png")
    category = datasets.read(tmp_path)
    assert list(category.groups(r"(part\d+)").values()) == ["part7"] * 3
    assert list(category.groups(r"^(.*)_").values()) == ["day1/part7", "day1/part7", "day2/part7"]
    assert category.groups("") == {}


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(part", "not a regular expression"),
        (r"part\d", "needs a parenthesis"),
        (r"part(\d)_a", r"doesn't match day1/part7_b\.png"),
        (r"part\d_(a)?", r"doesn't match day1/part7_b\.png"),
    ],
)
def test_a_pattern_that_leaves_images_without_a_group_is_refused(tmp_path, pattern, message):
    pictures(tmp_path, "day1/part7_a.png", "day1/part7_b.png")
    with pytest.raises(TrainingError, match=message):
        datasets.read(tmp_path).groups(pattern)


@pytest.mark.parametrize(
    "folder", ["Data/01/test/ko", "set/part/ground_truth/crack", "a/MT_Free", "broken"]
)
def test_a_data_set_further_down_is_not_taken_for_a_folder_of_normal_images(tmp_path, folder):
    """Else its defects and masks would be trained on."""
    for name in (folder, "good"):
        write_picture(tmp_path / name / "1.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(TrainingError, match="holds .*give the data set's own folder"):
        datasets.read(tmp_path)
    assert len(datasets.read(tmp_path, "folder").normal) == 2

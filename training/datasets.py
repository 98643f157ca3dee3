"""The field's data sets, each in the layout it is shipped in -> which pictures are what.

    categories(root)                 the products of a data set, by name
    read(root, category="bottle")    its normal images, and its labelled test images with masks

Nothing is copied, renamed or rewritten: a data set is read where and as it was unpacked.
"""

import csv
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from service import image
from training.errors import TrainingError


@dataclass(frozen=True)
class TestImage:
    """One labelled image; `mask` is None for normal images and where no mask file exists."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    path: Path
    kind: str  # "good" or the kind of defect
    mask: Path | None

    @property
    def anomalous(self) -> bool:
        return self.kind != "good"


@dataclass(frozen=True)
class Category:
    """The pictures of one product; every path lies below `root`, to which records refer."""

    root: Path
    layout: str
    name: str  # "" where `root` holds no more than this one
    normal: list[Path]  # to train on
    tests: list[TestImage]
    # What each normal image is one of several pictures of, where the layout tells.
    parts: dict[Path, str] = field(default_factory=dict)

    def to_train_on(self) -> list[Path]:
        """The normal images; raises TrainingError where there are none."""
        if not self.normal:
            where = LAYOUTS[self.layout].normal
            raise TrainingError(
                f"{self.root / self.name / where}: no images to train on "
                f"({', '.join(image.SUFFIXES)})"
            )
        return self.normal

    def to_test_on(self) -> list[TestImage]:
        """The test images; raises TrainingError unless some are normal and some anomalous."""
        if len({test.anomalous for test in self.tests}) < 2:
            where = LAYOUTS[self.layout].tests
            raise TrainingError(f"{self.root / self.name}: needs labelled test images: {where}")
        return self.tests

    def groups(self, pattern: str) -> dict[Path, str]:
        """The group of each normal image, by its path below `root`; empty where there are none.

        A group is what the pattern's first parenthesis matches; without a pattern it is the
        layout's. Raises TrainingError for a pattern that can't be one, or that leaves an image out.
        """
        if not pattern:
            return self.parts
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise TrainingError(f"--group {pattern}: not a regular expression: {error}") from None
        if not compiled.groups:
            raise TrainingError(
                f"--group {pattern}: needs a parenthesis around what pictures of a group share"
            )
        found = {}
        for path in self.normal:
            match = compiled.search(path.relative_to(self.root).as_posix())
            if match is None or match[1] is None:
                raise TrainingError(
                    f"--group {pattern}: doesn't match {path.relative_to(self.root)}"
                )
            found[path] = match[1]
        return found


Pictures = tuple[list[Path], list[TestImage], dict[Path, str]]  # normal, tests, parts


@dataclass(frozen=True)
class Layout:
    categories: Callable[[Path], list[str]]  # [""] where the folder is one itself, [] for neither
    read: Callable[[Path, str], Pictures]
    normal: str  # where normal images lie below a category, for who has none there
    tests: str


def categories(root: Path, layout: str = "auto") -> list[str]:
    """Names of the categories below `root`; [""] where `root` is one, [] for another layout.

    Raises TrainingError where there is no such folder or layout.
    """
    return _recognise(root, layout)[1]


def read(root: Path, layout: str = "auto", category: str = "") -> Category:
    """The pictures of a category, which need not be named where there is only one.

    Raises TrainingError for a folder that is not in the layout, or a category that it lacks.
    """
    layout, present = _recognise(root, layout)
    if not present:
        raise TrainingError(
            f"{root}: not in layout {layout}: no {LAYOUTS[layout].normal} for normal images"
        )
    if not category and len(present) == 1:
        category = present[0]
    if category not in present:
        if present == [""]:
            raise TrainingError(
                f"{root}: has no category {category}: read as layout {layout}, it is one itself"
            )
        wanted = f"has no category {category}" if category else "needs --category"
        raise TrainingError(f"{root}: {wanted}; it holds {', '.join(present)}")
    return Category(root, layout, category, *LAYOUTS[layout].read(root, category))


LABELLED = ("test", "ground_truth", "split_csv", "mt_free")  # folders of data sets
GOOD = ("good", "ok", "normal")
BAD = ("bad", "ng", "ko", "reject", "defect", "defective", "anomaly", "anomalous", "abnormal")


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, by path; dangling links too, so that reading names them."""
    return sorted(
        place / name
        for place, names in _walk(folder)
        for name in names
        if image.is_image_name(name)
    )


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `root` down and the names of its files; links are followed, each once."""
    seen = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield Path(place), names


def _recognise(root: Path, layout: str) -> tuple[str, list[str]]:
    if not root.is_dir():
        raise TrainingError(f"data folder {root}: no such folder")
    if layout == "auto":
        found = ((name, LAYOUTS[name].categories(root)) for name in AUTO)
        layout, present = next((name, present) for name, present in found if present)
        if layout == "folder":
            _refuse_labelled(root)
        return layout, present
    if layout not in LAYOUTS:
        raise TrainingError(f"--layout {layout}: must be one of auto, {', '.join(LAYOUTS)}")
    return layout, LAYOUTS[layout].categories(root)


def _refuse_labelled(root: Path) -> None:
    """A data set further down, or in a layout nobody knows, holds defects and masks as well."""
    for folder in sorted(place for place, _ in _walk(root) if place != root):
        name = folder.name.lower()
        kinds = name in GOOD and len(_folders(folder.parent)) > 1
        if kinds or name in LABELLED or name.removesuffix("s") in BAD:
            raise TrainingError(
                f"{root} looks like a plain folder of normal images, but holds "
                f"{folder.relative_to(root)}{' beside others' if kinds else ''}: give the data "
                "set's own folder as --data, or --layout folder if every image below it is normal"
            )


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


# MVTec AD: <category>/{train/good,test/<kind>,ground_truth/<kind>/<stem>_mask.png}. VAD is the
# same without masks, and has defects in train/bad, which is why only train/good is read.


def _mvtec_categories(root: Path) -> list[str]:
    if any((root / part).is_dir() for part in ("train", "test", "ground_truth")):
        return [""]
    return [
        folder.name
        for folder in _folders(root)
        if (folder / "train" / "good").is_dir() or (folder / "test" / "good").is_dir()
    ]


def _read_mvtec(root: Path, category: str) -> Pictures:
    return _read_split_folders(root / category, "good")


# BTAD: the same with `ok` for `good`, `ko` for the defects, and masks named as their images; .bmp
# and .png both occur, and a mask's ending may differ from its image's.


def _btad_categories(root: Path) -> list[str]:
    if (root / "train" / "ok").is_dir():
        return [""]
    return [folder.name for folder in _folders(root) if (folder / "train" / "ok").is_dir()]


def _read_btad(root: Path, category: str) -> Pictures:
    return _read_split_folders(root / category, "ok")


def _read_split_folders(folder: Path, normal: str) -> Pictures:
    tests = []
    for kind in _folders(folder / "test"):
        if kind.name == normal:
            tests += [TestImage(path, "good", None) for path in find_images(kind)]
        else:
            masks = _by_stem(find_images(folder / "ground_truth" / kind.name))
            tests += [
                TestImage(path, kind.name, masks.get(f"{path.stem}_mask") or masks.get(path.stem))
                for path in find_images(kind)
            ]
    return find_images(folder / "train" / normal), tests, {}


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    return {path.stem: path for path in paths}


# VisA: split_csv/1cls.csv lists every picture of all objects, by paths below the root. Its masks
# hold class indices 1, 2, ... as `data.read_mask` expects: whatever is not zero is defect.

VISA_SPLIT = Path("split_csv", "1cls.csv")
VISA_COLUMNS = {"object", "split", "label", "image", "mask"}


def _visa_rows(root: Path) -> list[dict[str, str]]:
    path = root / VISA_SPLIT
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not set(reader.fieldnames or ()) >= VISA_COLUMNS:
            raise TrainingError(f"{path}: needs columns {', '.join(sorted(VISA_COLUMNS))}")
        return list(reader)


def _visa_categories(root: Path) -> list[str]:
    return sorted({row["object"] for row in _visa_rows(root)})


def _read_visa(root: Path, category: str) -> Pictures:
    normal, tests = [], []
    for row in _visa_rows(root):
        if row["object"] != category:
            continue
        path = root / row["image"]
        kind = "good" if row["label"] == "normal" else row["label"]
        if row["split"] == "test":
            mask = root / row["mask"] if row["mask"] and kind != "good" else None
            tests.append(TestImage(path, kind, mask if mask and mask.is_file() else None))
        elif kind == "good":
            normal.append(path)
    return normal, tests, {}


# Magnetic tiles (MTD): MT_<Kind>/Imgs/exp<exposure>_num_<frame>.jpg, each with its mask beside it
# as .png. There is no official split; a fifth of MT_Free is for testing. A tile was photographed
# under up to six exposures one after the other, so pictures of one tile are told by their numbers.

MTD_NAME = re.compile(r"exp(\d+)_num_(\d+)")
MTD_SAME_TILE = 200  # frames; within a tile they are some dozens apart
MTD_TEST_SHARE = 0.2


def _mtd_categories(root: Path) -> list[str]:
    return [""] if (root / "MT_Free").is_dir() else []


def _read_mtd(root: Path, category: str) -> Pictures:
    """Whole tiles are for testing, so that none of them has been seen in training."""
    free = _mtd_pictures(root / "MT_Free")
    parts = tiles(free)
    order = sorted(set(parts.values()))
    random.Random(0).shuffle(order)
    test: list[Path] = []
    for tile in order:
        if len(test) >= int(MTD_TEST_SHARE * len(free)):
            break
        test += [path for path in free if parts[path] == tile]
    return _mtd_split(root, free, test, parts)


def _read_mtd_random(root: Path, category: str) -> Pictures:
    """Any fifth, as in the literature: nearly every test tile was seen under another exposure."""
    free = _mtd_pictures(root / "MT_Free")
    order = free.copy()
    random.Random(0).shuffle(order)
    return _mtd_split(root, free, order[int((1 - MTD_TEST_SHARE) * len(free)) :], {})


def tiles(paths: list[Path]) -> dict[Path, str]:
    """The magnetic tile that each picture shows, named so that tiles sort by frame.

    A new tile begins where the exposure doesn't increase from one frame to the next, or where
    frames are MTD_SAME_TILE or more apart. Raises TrainingError for a name without both numbers.
    """
    shots = []
    for path in paths:
        match = MTD_NAME.search(path.stem)
        if match is None:
            raise TrainingError(f"{path}: not named exp<exposure>_num_<frame> as tiles are")
        shots.append((int(match[2]), int(match[1]), path))
    found: dict[Path, str] = {}
    tile, last_frame, last_exposure = -1, 0, 0
    for frame, exposure, path in sorted(shots):
        if not found or exposure <= last_exposure or frame - last_frame >= MTD_SAME_TILE:
            tile += 1
        found[path] = f"{tile:04}"
        last_frame, last_exposure = frame, exposure
    return found


def _mtd_pictures(folder: Path) -> list[Path]:
    return [p for p in find_images(folder / "Imgs") if p.suffix.lower() in (".jpg", ".jpeg")]


def _mtd_split(root: Path, free: list[Path], test: list[Path], parts: dict[Path, str]) -> Pictures:
    chosen = set(test)
    tests = [TestImage(path, "good", None) for path in free if path in chosen]
    for folder in _folders(root):
        if folder.name.startswith("MT_") and folder.name != "MT_Free":
            masks = _by_stem(set(find_images(folder / "Imgs")) - set(_mtd_pictures(folder)))
            kind = folder.name.removeprefix("MT_").lower()
            tests += [TestImage(p, kind, masks.get(p.stem)) for p in _mtd_pictures(folder)]
    normal = [path for path in free if path not in chosen]
    return normal, tests, {path: parts[path] for path in normal if parts}


# Any other folder: every picture below it is normal.


def _read_folder(root: Path, category: str) -> Pictures:
    return find_images(root), [], {}


SPLIT_FOLDERS = "test/good and test/<defect>"
MTD_FOLDERS = "MT_Free/Imgs and MT_<defect>/Imgs"
_MVTEC = Layout(_mvtec_categories, _read_mvtec, "train/good", SPLIT_FOLDERS)
LAYOUTS = {
    "mvtec": _MVTEC,
    "visa": Layout(_visa_categories, _read_visa, VISA_SPLIT.as_posix(), "rows of split test"),
    "btad": Layout(_btad_categories, _read_btad, "train/ok", "test/ok and test/ko"),
    "vad": _MVTEC,
    "mtd": Layout(_mtd_categories, _read_mtd, "MT_Free/Imgs", MTD_FOLDERS),
    "mtd-random": Layout(_mtd_categories, _read_mtd_random, "MT_Free/Imgs", MTD_FOLDERS),
    "folder": Layout(lambda root: [""], _read_folder, "", f"{SPLIT_FOLDERS}, or another layout"),
}
AUTO = ("visa", "mtd", "btad", "mvtec", "folder")  # the surest marks first; `folder` takes all

"""A procedural data set: pictures of a bearing flange on a conveyor belt, normal or with a defect.

    flange -> defect -> relief under the lamp -> on the belt -> camera
    height, solid, albedo, turned, colour      light, shadow     blur, noise, RGB uint8

Lengths are fractions of the picture's side, points are (x, y) from the part's centre, y down.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from training.errors import TrainingError
from training.progress import progress

OVERSAMPLING = 2
# A defect is where it moves some channel by at least this many of 255 levels.
VISIBLE = 6

PLATE, CORNER, BOSS, SEAT, BORE = 0.385, 0.12, 0.275, 0.165, 0.115
HOLE, SPOT_FACE, THICKNESS = 0.030, 0.054, 0.045
HOLES = tuple((x, y) for x in (-0.285, 0.285) for y in (-0.285, 0.285))
METAL, SWARF = (0.97, 0.99, 1.0), (1.05, 1.0, 0.9)
FIBRES = ((0.25, 0.4, 0.95), (0.9, 0.3, 0.25), (0.3, 0.28, 0.26), (1.3, 1.25, 1.15))


@dataclass(frozen=True)
class Part:
    """The part from above, in its own frame, for pictures of s by s.

    Shared between threads: a defect makes new arrays, never changes these.
    """

    height: np.ndarray  # (2s, 2s) of the surface above the belt, going on over holes
    solid: np.ndarray  # (2s, 2s) 1 = part, 0 = the belt shows
    albedo: np.ndarray  # (2s, 2s)
    gloss: np.ndarray  # (2s, 2s)
    rough: np.ndarray  # (2s, 2s) 1 = as cast, less where machined
    turned: np.ndarray  # (2s, 2s) 1 = on a lathe
    colour: np.ndarray  # (s, s, 3)

    @property
    def size(self) -> int:
        """s, the picture's side."""
        return int(self.colour.shape[0])

    @property
    def side(self) -> int:
        return OVERSAMPLING * self.size


@dataclass(frozen=True)
class Scene:
    """Whatever differs from picture to picture, but for the defect."""

    rotation: float  # degrees
    shift: np.ndarray  # (2,)
    lamp: np.ndarray  # (3,) unit vector towards the lamp
    intensity: float
    defocus: float  # sigma
    belt: np.ndarray  # (s, s, 3)
    grain: np.ndarray  # (2s, 2s) relief of cast faces
    grooves: np.ndarray  # (b, b) relief of turned faces, of the boss alone
    noise: np.ndarray  # (s, s, 3)


def draw(
    rng: Generator, defect: str | None = None, size: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """An RGB uint8 (size, size, 3) picture and the boolean (size, size) mask of its defect.

    Without the defect, an equal generator gives the same picture outside the mask. Raises
    TrainingError for a defect that is none of DEFECTS.
    """
    if defect is not None and defect not in DEFECTS:
        raise TrainingError(f"defect {defect!r}: none of {', '.join(DEFECTS)}")
    own = rng.spawn(1)[0]  # leaves the part's stream alone
    scene, sound = _scene(rng, size), _sound(size)
    normal = _photograph(scene, sound)
    if defect is None:
        return normal, np.zeros((size, size), bool)
    picture = _photograph(scene, _DEFECTS[defect](own, sound))
    return picture, _changed(normal, picture)


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    differs = (cv2.absdiff(before, after).max(axis=2) >= VISIBLE).astype(np.uint8)
    return np.asarray(cv2.morphologyEx(differs, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)) > 0)


def write_dataset(
    folder: Path,
    *,
    train: int = 200,
    test_normal: int = 40,
    test_per_defect: int = 8,
    size: int = 512,
    seed: int = 0,
) -> None:
    """A data set in MVTec layout; the same bytes for the same arguments.

    Raises TrainingError where the folder holds anything already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainingError(f"{folder}: exists and is not an empty folder")
    splits: list[tuple[str, str | None, int]] = [
        ("train", None, train),
        ("test", None, test_normal),
    ]
    splits += [("test", defect, test_per_defect) for defect in DEFECTS]
    jobs = []
    for number, (split, defect, count) in enumerate(splits):
        target = folder / split / (defect or "good")
        target.mkdir(parents=True)
        if defect:
            (folder / "ground_truth" / defect).mkdir(parents=True)
        jobs += [(target, defect, number, index) for index in range(count)]

    def write(job: tuple[Path, str | None, int, int]) -> None:
        target, defect, number, index = job
        picture, mask = draw(np.random.default_rng([seed, number, index]), defect, size)
        _write_png(target / f"{index:03}.png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        if defect:
            truth = folder / "ground_truth" / defect / f"{index:03}_mask.png"
            _write_png(truth, mask.astype(np.uint8) * 255)

    _sound(size)  # cached here, or every thread would make its own at first
    with ThreadPoolExecutor() as pool:
        for _ in progress(pool.map(write, jobs), total=len(jobs), description="drawing"):
            pass


def _write_png(path: Path, pixels: np.ndarray) -> None:
    _, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    path.write_bytes(data.tobytes())


@lru_cache(maxsize=2)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, radius and angle (0 to 2 pi) of every point of the canvas."""
    side = OVERSAMPLING * size
    line = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
    x, y = np.meshgrid(line, line)
    return x, y, *cv2.cartToPolar(x, y)


def _boss(array: np.ndarray) -> np.ndarray:
    """View of the square around the boss, on which alone the turned faces lie."""
    side = array.shape[0]
    first = int((0.5 - BOSS) * side)
    return array[first : side - first, first : side - first]


def _ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """0 where `distance` is negative, 1 from `width` on: a chamfer."""
    return np.asarray(np.clip(distance / width, 0, 1), np.float32)


def _blur(array: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(array, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE))


@lru_cache(maxsize=2)
def _sound(size: int) -> Part:
    return _flange(size, HOLES, HOLES)


def _flange(
    size: int, drilled: tuple[tuple[float, float], ...], faced: tuple[tuple[float, float], ...]
) -> Part:
    x, y, radius, _ = _grid(size)
    pixel = 1 / x.shape[0]
    inside = _inside_plate(x, y)
    solid = _ramp(inside + pixel / 2, pixel) * _ramp(radius - BORE + pixel / 2, pixel)
    boss = _ramp(BOSS - radius, 0.012)
    height = THICKNESS - 0.012 * (1 - _ramp(inside, 0.014)) ** 2 + 0.022 * boss
    height -= 0.014 * _ramp(SEAT - radius, 0.006) + 0.006 * _ramp(BORE + 0.008 - radius, 0.008)
    height -= 0.003 * _ramp(0.006 - abs(radius - 0.245), 0.003)  # an oil groove
    machined = _ramp(BOSS - 0.01 - radius, pixel)
    turned = machined.copy()
    for centre in faced:
        away = np.hypot(x - centre[0], y - centre[1])
        height -= 0.006 * _ramp(SPOT_FACE - away, 0.005)
        machined = np.maximum(machined, _ramp(SPOT_FACE - 0.003 - away, pixel))
    for centre in drilled:
        away = np.hypot(x - centre[0], y - centre[1])
        height -= 0.005 * _ramp(HOLE + 0.006 - away, 0.006)
        solid *= _ramp(away - HOLE + pixel / 2, pixel)
    mark = _mark(size)
    height -= 0.003 * mark
    return Part(
        height=_blur(height, 0.0012 * x.shape[0]),
        solid=solid,
        albedo=(0.55 + 0.1 * machined) * (1 - 0.35 * mark),
        gloss=(0.25 + 0.4 * machined) * (1 - 0.5 * mark),
        rough=1 - 0.75 * machined,
        turned=turned,
        colour=np.full((size, size, 3), METAL, np.float32),
    )


def _inside_plate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the rounded square's outline, positive inside."""
    across, down = abs(x) - (PLATE - CORNER), abs(y) - (PLATE - CORNER)
    outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
    return np.asarray(CORNER - outside - np.minimum(np.maximum(across, down), 0))


def _mark(size: int) -> np.ndarray:
    """The stamped type number, bent around the boss."""
    _, _, radius, angle = _grid(size)
    strip = np.zeros((100, 1200), np.uint8)
    cv2.putText(strip, "FL-204  2417", (10, 82), cv2.FONT_HERSHEY_DUPLEX, 2.6, 255, 7, cv2.LINE_AA)
    scale = np.float32(100 / 0.05)  # rows of the strip to the ring's width
    along = (angle - np.float32(np.deg2rad(234))) * (np.float32(0.21) * scale)
    outward = (0.239 - radius) * scale
    mark = cv2.remap(strip, along, outward, cv2.INTER_LINEAR, borderValue=0)
    return np.asarray(mark, np.float32) / 255


def _scene(rng: Generator, size: int) -> Scene:
    rotation = float(rng.uniform(-3, 3))
    azimuth = np.deg2rad(rng.uniform(215, 235))  # from the upper left
    elevation = np.deg2rad(rng.uniform(48, 54))
    flat = np.cos(elevation)
    return Scene(
        rotation=rotation,
        shift=rng.uniform(-0.01, 0.01, 2),
        lamp=np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)]),
        intensity=float(rng.uniform(0.94, 1.06)),
        defocus=float(rng.uniform(0.001, 0.0015)),
        belt=_belt(rng, size),
        grain=_grain(rng, size),
        grooves=_grooves(rng, size),
        noise=rng.standard_normal((size, size, 3), np.float32),
    )


def _belt(rng: Generator, size: int) -> np.ndarray:
    """Matt woven rubber; the belt runs, so that its weave has another phase each time."""
    period, phase = 0.022, rng.uniform(0, 2 * np.pi, 2)
    wave = np.arange(size) / size * 2 * np.pi / period
    weave = np.outer(np.sin(wave + phase[0]), np.sin(wave + phase[1])).astype(np.float32)
    rough = _blur(rng.standard_normal((size, size), np.float32), 1.0)
    cloud = cv2.resize(rng.standard_normal((7, 7), np.float32), (size, size), None, 0, 0, 2)
    light = 0.19 * (1 + 0.10 * weave + 0.22 * rough + 0.04 * cloud)
    return np.asarray(cv2.merge([0.86 * light, 1.0 * light, 1.02 * light]), np.float32)


def _grain(rng: Generator, size: int) -> np.ndarray:
    """The skin of sand-cast metal: grains and deeper pits, on faint waves."""
    fine = _blur(rng.standard_normal((size, size), np.float32), 0.7)
    coarse = cv2.resize(fine[: size // 2, : size // 2], (size, size), interpolation=cv2.INTER_CUBIC)
    skin = fine + 1.2 * coarse + 5 * np.minimum(coarse + 0.55, 0)
    skin += 6 * cv2.resize(fine[:24, :24], (size, size), interpolation=cv2.INTER_CUBIC)
    side = OVERSAMPLING * size
    return np.asarray(cv2.resize(skin, (side, side), interpolation=cv2.INTER_LINEAR))


def _grooves(rng: Generator, size: int) -> np.ndarray:
    """The lathe's fine rings: noise over radius that changes slowly along the angle."""
    radius, angle = (_boss(a) for a in _grid(size)[2:])
    rings, turns = size // 2, 40
    noise = rng.standard_normal((rings, turns), np.float32)
    closed = cv2.copyMakeBorder(noise, 0, 0, 8, 8, cv2.BORDER_WRAP)
    polar = cv2.GaussianBlur(closed, (17, 1), 3)[:, 8:-8] * np.float32(2.4)
    polar += rng.standard_normal((rings, 1), np.float32) * 0.8
    across, down = angle * np.float32(turns / 2 / np.pi), radius * np.float32(rings / BOSS)
    return np.asarray(cv2.remap(polar, across, down, cv2.INTER_LINEAR, None, cv2.BORDER_WRAP))


def _photograph(scene: Scene, part: Part) -> np.ndarray:
    """Light the part in its own frame, lay it on the belt, and take the picture."""
    turn = np.deg2rad(scene.rotation)
    x, y, z = scene.lamp
    lamp = np.array(
        [x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn), z], np.float32
    )
    lit, ground = _shadows(part, lamp)
    shade = _shade(scene, part, lamp, lit)
    layers = _placed(cv2.merge([shade * part.solid, part.solid]), scene)
    shade, solid = cv2.split(
        cv2.resize(layers, (part.size, part.size), interpolation=cv2.INTER_AREA)
    )
    line = np.linspace(-0.25, 0.25, part.size, dtype=np.float32)
    fall_off = scene.intensity * (1 + float(x) * line + float(y) * line[:, None])
    shade *= fall_off
    ground = _placed(ground, scene) * (1 - solid) * fall_off
    light = cv2.merge([shade] * 3) * _placed(part.colour, scene)
    return _camera(scene, light + cv2.merge([ground] * 3) * scene.belt)


def _placed(layers: np.ndarray, scene: Scene) -> np.ndarray:
    side = layers.shape[0]
    middle = (side - 1) / 2
    affine = cv2.getRotationMatrix2D((middle, middle), -scene.rotation, 1)
    affine[:, 2] += scene.shift * side
    return np.asarray(cv2.warpAffine(layers, affine, (side, side), borderMode=cv2.BORDER_REPLICATE))


def _shade(scene: Scene, part: Part, lamp: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """(2s, 2s) brightness of the part's surface; in place where it can be, for speed."""
    half = lamp + np.array([0, 0, 1], np.float32)  # between lamp and camera
    half /= np.linalg.norm(half)
    rough = scene.grain * part.rough
    _boss(rough)[:] += _boss(part.turned) * (0.55 * scene.grooves - _boss(rough))
    relief = cv2.scaleAdd(rough, part.side / 1024 * 0.16, part.height * part.side)
    dx = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=1 / 8)
    dy = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=1 / 8)
    upright = 1 / cv2.sqrt(1 + dx * dx + dy * dy)
    diffuse = _towards(lamp, dx, dy, upright)
    glint = cv2.pow(_towards(half, dx, dy, upright), 16)
    # Kajiya and Kay: grooves reflect into a plane across them, hence the lathe's two bright wedges.
    x, y, radius, _ = (_boss(a) for a in _grid(part.size))
    uphill = (x * _boss(dy) - y * _boss(dx)) * half[2]
    along = (x * half[1] - y * half[0] + uphill) / radius * _boss(upright)
    lathe = 1.2 * cv2.pow(1 - along * along, 16) * _boss(diffuse)
    _boss(glint)[:] += _boss(part.turned) * (lathe - _boss(glint))
    diffuse *= lit
    glint *= lit
    glint *= part.gloss
    return np.asarray(part.albedo * cv2.addWeighted(diffuse, 0.62, upright, 0.26, 0) + glint)


def _towards(
    direction: np.ndarray, dx: np.ndarray, dy: np.ndarray, upright: np.ndarray
) -> np.ndarray:
    """Cosine between the surface's normal and a direction; 0 where it faces away."""
    x, y, z = (float(v) for v in direction)
    cosine = cv2.addWeighted(dx, -x, dy, -y, z)
    cosine *= upright
    return np.asarray(np.maximum(cosine, 0, out=cosine))


def _shadows(part: Part, lamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of the lamp's light reaches the surface (2s, 2s) and the belt (s, s): 0 to 1."""
    size = part.size
    half = (size // 2, size // 2)  # they are soft
    surface = cv2.resize(part.height, half, interpolation=cv2.INTER_AREA)
    solid = cv2.resize(part.solid, half, interpolation=cv2.INTER_AREA)
    flat = float(np.hypot(lamp[0], lamp[1]))
    tallest = np.zeros_like(surface)
    for away in np.linspace(0.004, 0.06, 12):
        x, y = away * half[0] * lamp[:2] / flat
        shift = np.array([[1, 0, -x], [0, 1, -y]])
        above = cv2.warpAffine(surface * solid, shift, half) - away * float(lamp[2]) / flat
        tallest = np.maximum(tallest, above)
    lit = 1 - 0.75 * _blur(_ramp(tallest - surface, 0.006), 0.003 * size / 2)
    ground = 1 - 0.6 * _blur(_ramp(tallest, 0.01), 0.005 * size / 2)
    ground *= 1 - 0.55 * _blur(solid, 0.018 * size / 2)
    return cv2.resize(lit, (part.side, part.side)), cv2.resize(ground, (size, size))


def _camera(scene: Scene, light: np.ndarray) -> np.ndarray:
    size = light.shape[0]
    picture = 1.13 * (1 - cv2.exp(-1.45 * _blur(light, scene.defocus * size)))
    picture += scene.noise * (0.004 + 0.008 * picture)  # read and shot noise
    return np.asarray(np.clip(picture * 255 + 0.5, 0, 255), np.uint8)


def _spot(rng: Generator, part: Part, margin: float) -> np.ndarray:
    """A point on the part, at least `margin` from every edge of it."""
    metal = (part.solid > 0.5).astype(np.uint8)
    depth = cv2.distanceTransform(metal, cv2.DIST_L2, 3)
    rows, columns = np.nonzero(depth > margin * part.side)
    chosen = rng.integers(len(rows))
    return np.array([columns[chosen], rows[chosen]]) / part.side - 0.5


def _path(
    rng: Generator, start: np.ndarray, length: float, heading: float, turn: float, jitter: float
) -> np.ndarray:
    """(65, 2) points of a curve that turns by `turn` radians, ever more slowly, on its way."""
    t = np.linspace(0, 1, 64)
    headings = heading + turn * t + jitter * np.cumsum(rng.standard_normal(len(t)))
    strides = (1 + 3 * t) / np.sum(1 + 3 * t) * length
    moves = np.stack([np.cos(headings), np.sin(headings)], axis=1) * strides[:, None]
    return np.vstack([start, start + np.cumsum(moves, axis=0)])


def _stroke(points: np.ndarray, width: float, side: int) -> np.ndarray:
    """(side, side) coverage of a line, tapered towards its end."""
    canvas = np.zeros((side, side), np.uint8)
    pixels = np.round((points + 0.5) * side * 16).astype(np.int32)
    widths = width * side * np.linspace(1, 0.5, len(points) - 1)
    for i, thickness in enumerate(widths):
        cv2.line(canvas, pixels[i], pixels[i + 1], 255, max(1, round(thickness)), cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255


def _blob(
    rng: Generator, centre: np.ndarray, radius: float, roughness: float, size: int
) -> np.ndarray:
    """1 at the centre of an irregular ellipse, 0 at its outline, negative outside."""
    x, y, _, _ = _grid(size)
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.6)
    x, y = x - float(centre[0]), y - float(centre[1])
    across = (x * np.cos(angle) + y * np.sin(angle)) * stretch
    down = (y * np.cos(angle) - x * np.sin(angle)) / stretch
    cells = round(2.2 / radius)
    noise = rng.standard_normal((cells, cells), np.float32)
    bumps = cv2.resize(noise, x.shape, interpolation=cv2.INTER_CUBIC)
    return np.asarray(1 - np.hypot(across, down) / radius + roughness * bumps, np.float32)


def _bumps(rng: Generator, size: int) -> np.ndarray:
    shape = OVERSAMPLING * size, OVERSAMPLING * size
    return np.asarray(3 * _blur(rng.standard_normal(shape, np.float32), 1.6))


def _tinted(part: Part, amount: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    amount = cv2.resize(amount, (part.size, part.size), interpolation=cv2.INTER_AREA)[..., None]
    return np.asarray(part.colour + amount * (np.array(colour, np.float32) - part.colour))


def _engraved(part: Part, line: np.ndarray, depth: float, tone: float) -> Part:
    line = line * part.solid
    return replace(
        part,
        height=part.height - depth * _blur(line, 0.0012 * part.side),
        albedo=part.albedo * (1 + tone * line),
        gloss=part.gloss * (1 + tone * line),
    )


def _scratch(rng: Generator, part: Part) -> Part:
    """One to three grooves side by side, bright with fresh metal or dark with dirt."""
    start, heading = _spot(rng, part, 0.02), rng.uniform(0, 2 * np.pi)
    length, turn = rng.uniform(0.08, 0.3), rng.uniform(-0.8, 0.8)
    width, spacing = rng.uniform(0.002, 0.005), rng.uniform(0.004, 0.009)
    groove = np.zeros_like(part.height)
    for offset in range(rng.integers(1, 4)):
        beside = start + spacing * offset * np.array([-np.sin(heading), np.cos(heading)])
        path = _path(rng, beside, length * rng.uniform(0.6, 1), heading, turn, 0.01)
        groove = np.maximum(groove, _stroke(path, width, part.side))
    strength = rng.uniform(0.5, 1)
    return _engraved(part, groove, 0.0025 * strength, float(rng.choice([-0.6, 0.8])) * strength)


def _crack(rng: Generator, part: Part) -> Part:
    """A dark, branching hairline that starts at the bore or at a bolt hole."""
    centre, radius, heading = np.zeros(2), BORE, rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.4:  # from a bolt hole inwards
        centre, radius = np.array(HOLES[rng.integers(len(HOLES))]), HOLE
        heading = np.arctan2(-centre[1], -centre[0]) + rng.uniform(-0.7, 0.7)
    start = centre + 0.98 * radius * np.array([np.cos(heading), np.sin(heading)])
    length, width = rng.uniform(0.08, 0.2), rng.uniform(0.002, 0.0045)
    trunk = _path(rng, start, length, heading, 0, 0.2)
    line = _stroke(trunk, width, part.side)
    for _ in range(rng.integers(1, 4)):
        aside = heading + rng.choice([-1, 1]) * rng.uniform(0.4, 1)
        fork, reach = trunk[rng.integers(20, 56)], length * rng.uniform(0.2, 0.45)
        branch = _path(rng, fork, reach, aside, 0, 0.2)
        line = np.maximum(line, _stroke(branch, 0.6 * width, part.side))
    return _engraved(part, line, 0.003, -0.9)


def _dent(rng: Generator, part: Part) -> Part:
    """A blow: a smooth hollow with the metal thrown up around it."""
    radius = rng.uniform(0.018, 0.05)
    field = _blob(rng, _spot(rng, part, 0.025), radius, 0.04, part.size)
    inside = np.clip(field, 0, 1)
    lip = np.clip(1 - abs(field + 0.05) / 0.25, 0, 1) ** 2
    depth = radius * rng.uniform(0.3, 0.6)
    return replace(part, height=part.height + depth * (0.12 * lip - inside**2 * (3 - 2 * inside)))


def _stain(rng: Generator, part: Part) -> Part:
    """Oil, which darkens and shines, or rust, which is rough and dull."""
    field = _blob(rng, _spot(rng, part, 0.03), rng.uniform(0.04, 0.1), 0.22, part.size)
    amount = _ramp(field, 0.7) * part.solid * rng.uniform(0.55, 1)
    oil = rng.random() < 0.5
    return replace(
        part,
        height=part.height + (0 if oil else 0.0006) * amount * _bumps(rng, part.size),
        albedo=part.albedo * (1 - (0.6 if oil else 0.3) * amount),
        gloss=part.gloss * (1 - (0 if oil else 0.9) * amount),
        colour=_tinted(part, amount, (0.92, 0.78, 0.5) if oil else (0.95, 0.55, 0.3)),
    )


def _chip(rng: Generator, part: Part) -> Part:
    """A bit broken off the outline or the bore; the fracture around it is rough and bright."""
    if rng.random() < 0.6:
        radius = rng.uniform(0.022, 0.06)
        centre = np.array([rng.uniform(-0.25, 0.25), PLATE * rng.choice([-1, 1])])
        centre = rng.permutation(centre)
    else:
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.035)
        centre = BORE * np.array([np.cos(angle), np.sin(angle)])
    field = _blob(rng, centre, radius, 0.16, part.size)
    fracture, broken = _ramp(field + 0.45, 0.45), _ramp(field + 0.45, 0.1)
    return replace(
        part,
        height=part.height - fracture * (0.4 * radius + 0.0012 * _bumps(rng, part.size)),
        solid=part.solid * (1 - _ramp(field, 0.06)),
        albedo=part.albedo * (1 + 0.3 * broken),
        turned=part.turned * (1 - broken),
        rough=np.maximum(part.rough, fracture),
    )


def _missing_hole(rng: Generator, part: Part) -> Part:
    """One bolt hole was not drilled; its spot face may be there or not."""
    absent = HOLES[rng.integers(len(HOLES))]
    drilled = tuple(hole for hole in HOLES if hole != absent)
    return _flange(part.size, drilled, HOLES if rng.random() < 0.5 else drilled)


def _contamination(rng: Generator, part: Part) -> Part:
    """A fibre or a curl of swarf that lies on the part, perhaps over an edge of it."""
    start, heading = _spot(rng, part, 0.02), rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        path = _path(rng, start, rng.uniform(0.1, 0.25), heading, rng.uniform(-4, 4), 0.1)
        width, albedo, gloss = rng.uniform(0.003, 0.0055), 0.5, 0.1
        colour = FIBRES[rng.integers(len(FIBRES))]
    else:
        turn = rng.uniform(7, 14) * float(rng.choice([-1, 1]))
        path = _path(rng, start, rng.uniform(0.15, 0.35), heading, turn, 0.06)
        width, albedo, gloss = rng.uniform(0.006, 0.011), 0.7, 0.9
        colour = SWARF
    body = _stroke(path, width, part.side)
    shadow = _blur(_stroke(path + 0.9 * width, width, part.side), 0.0025 * part.side)
    dimmed = (1 - 0.55 * shadow) * (1 - body)
    return replace(
        part,
        height=part.height + 0.6 * width * _blur(body, 0.35 * width * part.side),
        solid=np.maximum(part.solid, body),
        albedo=part.albedo * dimmed + albedo * body,
        gloss=part.gloss * dimmed + gloss * body,
        turned=part.turned * (1 - body),
        colour=_tinted(part, body, colour),
    )


_DEFECTS: dict[str, Callable[[Generator, Part], Part]] = {
    "chip": _chip,
    "contamination": _contamination,
    "crack": _crack,
    "dent": _dent,
    "missing_hole": _missing_hole,
    "scratch": _scratch,
    "stain": _stain,
}
DEFECTS = tuple(_DEFECTS)

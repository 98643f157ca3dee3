"""A bundle whose graph is small enough to know its answers by heart, and a service around it.

The graph's anomaly map is the image's brightness (mean of RGB, 0 to 1), so a bright spot on a dark
picture is an anomaly of known score, place and size. It is run by the real ONNX Runtime.
"""

import io
import os
import shutil
import subprocess
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service import bundle as bundles
from service import devices
from service.app import create_app
from service.bundle import (
    Bundle,
    Golden,
    Graph,
    HeldOutImage,
    Manifest,
    Network,
    Teacher,
    TrainingData,
)
from service.database import Database
from service.image import digest
from service.inspections import Record, first_id
from service.settings import Settings
from training.rehearsal import free_port

# The same examples for everybody, however slow the machine.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")

# `apt-get install postgresql` puts them where no PATH looks.
POSTGRESQL = sorted(
    Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parts[-2])
)
HAS_CUDA = devices.CUDA in ort.get_available_providers() and Path("/dev/nvidia0").exists()
SIZE = (64, 96)  # height, width: not square, so that swapped axes show


class PostgreSql:
    """A server on a free port, over a folder that is removed afterwards."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self._port = free_port()
        # It refuses to run as root; the package made a user for it.
        self._as = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self._as:
            shutil.chown(self._folder, "postgres")
        self._run("initdb", "-A", "trust", "-U", "postgres", "-N", "-D", str(self._data))

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-w", "-D", str(self._data), "-o", options, "-l", self._log, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "-D", str(self._data), "stop")

    def remove(self) -> None:
        shutil.rmtree(self._folder)

    def new_database(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "postgres", name)
        return f"postgresql://postgres@127.0.0.1:{self._port}/{name}"

    @property
    def _log(self) -> str:
        return str(self._folder / "log")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._binaries / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
        assert done.returncode == 0, done.stderr


def brightness_graph(
    size: tuple[int, int] = SIZE,
    *,
    output: str = "anomaly_map",
    fragile: bool = False,
    hanging: bool = False,
    gain: float = 1.0,
    zeros: int = 255,
) -> bytes:
    """image uint8 (N, h, w, 3) -> mean of RGB / 255 (times `gain`) and its maximum.

    A `fragile` graph raises in the runtime for a batch with a pure white first pixel, which it
    looks up among `zeros`; more of them make it a large one that doesn't. A `hanging` one never
    comes back from such a batch.
    """
    trapped = fragile or hanging
    scale = numpy_helper.from_array(np.array(gain / 255, np.float32), "scale")
    channel = numpy_helper.from_array(np.array([3], np.int64), "channel")
    places = numpy_helper.from_array(np.array([1, 2], np.int64), "places")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["unchecked" if trapped else "scaled"]),
        helper.make_node("ReduceMean", ["scaled", "channel"], [output], keepdims=0),
        helper.make_node("ReduceMax", [output, "places"], ["image_score"], keepdims=0),
    ]
    constants = [scale, channel, places]
    if trapped:
        nodes += _trap(_endless_loop() if hanging else _short_table())
        constants += [
            numpy_helper.from_array(np.zeros(zeros, np.float32), "zeros"),
            numpy_helper.from_array(np.zeros(1, np.int64), "corner_start"),
            numpy_helper.from_array(np.ones(1, np.int64), "corner_end"),
        ]
    graph = helper.make_graph(
        sorted(
            nodes, key=lambda node: node.op_type == "ReduceMean" or "image_score" in node.output
        ),
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *size, 3])],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *size]),
            helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["batch"]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def added_to_map(tensor: TensorProto) -> bytes:
    """The brightness graph whose map has this one (1, h, w) added to it."""
    model = onnx.load_from_string(brightness_graph())
    model.graph.initializer.append(tensor)
    *before, maximum = model.graph.node
    before[-1].output[0] = "own"
    add = helper.make_node("Add", ["own", tensor.name], ["anomaly_map"])
    del model.graph.node[:]
    model.graph.node.extend([*before, add, maximum])
    return bytes(model.SerializeToString())


def _short_table() -> list[onnx.NodeProto]:
    """Looks each `row` up in a table of zeros: 255 of them lack the last."""
    return [helper.make_node("Gather", ["zeros", "row"], ["nothing"])]


def _endless_loop() -> list[onnx.NodeProto]:
    """Adds zeros as long as it takes, which is forever where a `row` is 255."""
    scalar = numpy_helper.from_array(np.array(0, np.float32), "zero")
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["goes_on_then"]),
            helper.make_node("Add", ["sum", "zero"], ["sum_then"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes_on_then", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_then", TensorProto.FLOAT, []),
        ],
        [scalar],
    )
    return [
        helper.make_node("ReduceMax", ["row"], ["highest"], keepdims=0),
        helper.make_node("Constant", [], ["white"], value_int=255),
        helper.make_node("Equal", ["highest", "white"], ["is_white"]),
        helper.make_node("Cast", ["is_white"], ["once"], to=TensorProto.INT64),
        helper.make_node("Constant", [], ["forever"], value_int=2**60),
        helper.make_node("Mul", ["once", "forever"], ["turns"]),
        helper.make_node("Constant", [], ["begin"], value_float=0.0),
        helper.make_node("Loop", ["turns", "", "begin"], ["nothing"], body=body),
    ]


def _trap(nothing: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Adds `nothing`, made of the red value of each first pixel."""
    corner = ["image"]
    nodes = []
    for axis in (1, 2, 3):
        name = f"axis{axis}"
        nodes.append(
            helper.make_node("Constant", [], [name], value_ints=[axis])  # type: ignore[list-item]
        )
        nodes.append(
            helper.make_node(
                "Slice", [corner[-1], "corner_start", "corner_end", name], [f"corner{axis}"]
            )
        )
        corner.append(f"corner{axis}")
    return [
        *nodes,
        helper.make_node("Cast", [corner[-1]], ["row"], to=TensorProto.INT64),
        *nothing,
        helper.make_node("Add", ["unchecked", "nothing"], ["scaled"]),
    ]


def manifest_of(
    graph: bytes,
    *,
    name: str = "part",
    version: int = 1,
    scores: tuple[float, ...] = tuple(np.linspace(0.1, 0.3, 99)),
    size: tuple[int, int] = SIZE,
    digests: tuple[str, ...] | None = None,
    golden: Golden | None = None,
) -> Manifest:
    digests = digests or tuple(f"{i:064x}" for i in range(len(scores)))
    return Manifest(
        name=name,
        version=version,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        image_size=size,
        graph=Graph(
            sha256=digest(graph), opset=20, weights="float32", parity=0.0, weight_rounding=0.0
        ),
        network=Network(
            architecture="sk-rd4ad",
            backbone="resnet18",
            skips="sk",
            consistency_rate=0.005,
            embedding_planes=512,
        ),
        teacher=Teacher(origin="test", sha256="0" * 64, licence="Apache-2.0"),
        data=TrainingData(
            fingerprint="1" * 64,
            trained=[f"{i:064x}" for i in range(1000, 1100)],
            held_out=[
                HeldOutImage(file=f"train/good/{i:03}.png", sha256=sha256, score=float(score))
                for i, (sha256, score) in enumerate(zip(digests, scores, strict=True))
            ],
        ),
        training={"epochs": 1},
        metrics={"loss": 0.1},
        golden=golden,
    )


def golden_of(
    brightness: float = 0.2, score: float | None = None, **more: object
) -> tuple[Golden, bytes]:
    """A flat golden picture, with the score that the brightness graph gives it unless told."""
    pixels = picture(brightness)
    data = encoded(pixels)
    true = float(pixels.max()) / 255
    return Golden(sha256=digest(data), score=true if score is None else score, **more), data


@pytest.fixture
def write_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Writes the brightness graph as a bundle below `tmp_path/models`."""

    def write(
        name: str = "part",
        version: int = 1,
        graph: bytes | None = None,
        golden: tuple[Golden, bytes] | None = None,
        **manifest: object,
    ) -> Bundle:
        graph = graph or brightness_graph()
        folder = tmp_path / "models" / name / str(version)
        if golden:
            manifest["golden"] = golden[0]
        written = manifest_of(graph, name=name, version=version, **manifest)  # type: ignore[arg-type]
        bundles.write(folder, written, graph, golden[1] if golden else None)
        return Bundle(folder)

    return write


class SlowDisk:
    """A bundle whose graph can't be read to its end before the test says so."""

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.folder / "model.onnx"
        self._graph = self._path.read_bytes()
        self._path.unlink()
        os.mkfifo(self._path)

    def wait_for_reader(self) -> None:
        """Until the graph is being loaded."""
        self._pipe = self._path.open("wb")

    def let_go(self) -> None:
        with self._pipe:
            self._pipe.write(self._graph)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def bundle_files(
    graph: bytes | None = None, golden: tuple[Golden, bytes] | None = None, **manifest: object
) -> dict[str, bytes]:
    """The files of a bundle, by name, as they would be zipped."""
    graph = graph or brightness_graph()
    written = manifest_of(graph, golden=golden[0] if golden else None, **manifest)  # type: ignore[arg-type]
    files = {"manifest.json": written.model_dump_json().encode(), "model.onnx": graph}
    return files | ({"golden.png": golden[1]} if golden else {})


def upload(client: TestClient, data: bytes, **query: object):
    """POST a zip to /v1/models."""
    headers = {"Content-Type": "application/zip"}
    return client.post("/v1/models", content=data, params=query, headers=headers)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSql]:
    """A real server of this session's own; skips where none is installed."""
    if not POSTGRESQL:
        pytest.skip("no PostgreSQL is installed: apt-get install postgresql")
    if os.getuid() == 0 and not shutil.which("runuser"):
        pytest.skip("PostgreSQL doesn't run as root, and there is no runuser")
    server = PostgreSql(POSTGRESQL[-1])
    server.start()
    yield server
    server.stop()
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that is not there yet, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'service.sqlite'}"
    server: PostgreSql = request.getfixturevalue("postgresql")
    return server.new_database()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url)) as database:
        yield database


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "models").mkdir(exist_ok=True)
    return Settings(
        models=tmp_path / "models",
        database_url=f"sqlite:///{tmp_path / 'state' / 'service.sqlite'}",
        device="cpu",
        threads=1,
    )


@pytest.fixture
def client(settings: Settings, write_bundle: Callable[..., Bundle]) -> Iterator[TestClient]:
    """The real app with one model, `part`, whose default threshold lies just above 0.3."""
    write_bundle()
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """The port of an HTTP server on threads of its own, whose GET and POST `answer` answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def record(number: int = 0, at: datetime | None = None, **changed: object) -> Record:
    """The inspection of a second, or of a moment; the same for the same number."""
    at = at or datetime(2026, 11, 26, 12, tzinfo=UTC) + timedelta(seconds=number)
    made = Record(
        id=f"{first_id(at)}{number:016x}",
        at=at,
        request_id=f"request-{number}",
        by="line-3",
        model="part",
        version=1,
        digest="a" * 64,
        calibration="bundle",
        profile="station-3",
        sha256=f"{number:064x}",
        bytes=1000 + number,
        width=96,
        height=64,
        score=0.5,
        threshold=0.6,
        threshold_source="bundle",
        p_value=0.25,
        decision="normal",
        decode_ms=6.1,
        queue_ms=0.2,
        infer_ms=47.5,
        render_ms=2.4,
        total_ms=57.0,
        archived=False,
    )
    return made._replace(**changed)


def picture(brightness: float = 0.1, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A flat RGB image (h, w, 3)."""
    return np.full((*size, 3), round(255 * brightness), np.uint8)


def spotted(brightness: float = 0.9) -> np.ndarray:
    """A dark image with a bright rectangle: columns 30 to 49, rows 20 to 29."""
    pixels = picture(0.1)
    pixels[20:30, 30:50] = round(255 * brightness)
    return pixels


def exif_of(orientation: int) -> Image.Exif:
    """The tag 274 of EXIF 2.3 alone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def encoded(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def inspect(client: TestClient, data: bytes, **query: object):
    """POST a PNG to /v1/inspect."""
    return client.post(
        "/v1/inspect", content=data, params=query, headers={"Content-Type": "image/png"}
    )


def calibrate(client: TestClient, images: list[tuple[str, bytes]], **query: object):
    """POST (name, bytes) pairs to /v1/calibrate."""
    files = [("images", (name, data, "image/png")) for name, data in images]
    return client.post("/v1/calibrate", files=files, params=query)


def normal_pictures(count: int) -> list[tuple[str, bytes]]:
    """Distinct dark images, brightness rising from 0.10 to 0.20 of 1."""
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(count):
        pixels = picture(0.1 + 0.1 * number / max(count - 1, 1))
        pixels[..., 0] -= rng.integers(0, 3, SIZE, np.uint8)
        pictures.append((f"{number:03}.png", encoded(pixels)))
    return pictures

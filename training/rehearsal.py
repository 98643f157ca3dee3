"""A bundle in the real service, over HTTP, before it goes to the line.

Starts the service as a process of its own, calibrates it with the held-out normal images, sends
every test image, and holds the answers against `evaluate`'s.
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from service import image
from service.bundle import Bundle, HeldOutImage
from service.calibration import default_target_fpr
from service.devices import Device, Precision
from training.datasets import TestImage
from training.errors import TrainingError
from training.evaluate import (
    Decisions,
    Report,
    are_anomalous,
    decisions_at,
    report_on,
    score_images,
)
from training.metrics import ImageMetrics, image_metrics
from training.progress import progress

CLIENTS = 8
PICTURES_PER_KIND = 2
AUROC_LIMIT = 1e-4


@dataclass(frozen=True)
class Rehearsal:
    evaluation: Report
    image: ImageMetrics  # of the service's scores
    decisions: Decisions  # after calibrating over HTTP
    calibration: dict[str, Any]
    auroc_difference: float
    images_per_s: float

    def as_dict(self) -> dict[str, object]:
        calibration = {k: v for k, v in self.calibration.items() if k != "outliers"}
        return {
            "evaluation": self.evaluation.as_dict(),
            "http": {
                "image": asdict(self.image),
                "decisions": self.decisions.as_dict(),
            },
            "calibration": calibration,
            "auroc_difference": self.auroc_difference,
            "images_per_s": self.images_per_s,
        }


def rehearse(
    folder: Path,
    root: Path,
    *,
    layout: str | None = None,
    category: str | None = None,
    normals: Path | None = None,
    target_fpr: float | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    pictures: Path | None = None,
) -> Rehearsal:
    """Evaluate, serve, calibrate and inspect the bundle in `folder` with the images of `root`.

    The held-out images lie below `normals`, by default `root`. Writes overlays of a few test
    images of each kind to `pictures`. Raises TrainingError where the service doesn't start, refuses
    an image that `evaluate` could read, or ranks the images differently: image AUROC must agree to
    AUROC_LIMIT.
    """
    bundle = Bundle(folder)
    if not bundle.manifest.data.held_out:
        raise TrainingError(
            f"{folder}: has no held-out images to calibrate with: import it with --normals"
        )
    held_out = [_held_out(normals or root, one) for one in bundle.manifest.data.held_out]
    scored = score_images(
        folder, root, layout=layout, category=category, device=device, precision=precision
    )
    evaluation, tests = report_on(scored), scored.tests
    target = default_target_fpr(len(held_out)) if target_fpr is None else target_fpr
    with serving(folder, device, precision) as client:
        calibration = _calibrate(client, held_out, target)
        started = time.perf_counter()
        answers = _inspect_all(client, tests)
        seconds = time.perf_counter() - started
        if pictures:
            _save_pictures(client, tests, pictures)
    scores = np.array([answer["score"] for answer in answers])
    metrics = image_metrics(scores, are_anomalous(tests))
    difference = abs(metrics.auroc - evaluation.image.auroc)
    if difference > AUROC_LIMIT:
        raise TrainingError(
            f"the service's image AUROC is {metrics.auroc:.5f}, evaluate's "
            f"{evaluation.image.auroc:.5f}: they must agree to {AUROC_LIMIT:g}"
        )
    return Rehearsal(
        evaluation=evaluation,
        image=metrics,
        decisions=decisions_at(tests, scores, calibration["threshold"], target),
        calibration=calibration,
        auroc_difference=difference,
        images_per_s=len(tests) / seconds,
    )


def _held_out(root: Path, held_out: HeldOutImage) -> Path:
    path = root / held_out.file
    if not path.is_file() or image.digest(path.read_bytes()) != held_out.sha256:
        raise TrainingError(
            f"{path}: the held-out image is not there, or has changed; --data must be the folder "
            "that the bundle was trained on, or --normals that, or the one it was imported with"
        )
    return path


def table(rehearsal: Rehearsal) -> str:
    """What the service answered, as text for a terminal."""
    decisions, calibration = rehearsal.decisions, rehearsal.calibration
    width = max(len(kind) for kind in decisions.kinds)
    lines = [
        f"over HTTP: image AUROC {rehearsal.image.auroc:.4f} "
        f"(differs from evaluate's by {rehearsal.auroc_difference:.1e}), "
        f"{rehearsal.images_per_s:.1f} images/s with {CLIENTS} clients",
        f"  calibrated on {calibration['samples']} held-out normal images: threshold "
        f"{calibration['threshold']:.4f}, promised false-positive rate "
        f"{calibration['achievable_fpr']:.3g}",
        f"  {'good':{width}}  false positives {decisions.false_positives}",
    ]
    lines += [f"  {kind:{width}}  detected {rate}" for kind, rate in decisions.kinds.items()]
    return "\n".join(lines)


@contextlib.contextmanager
def serving(
    folder: Path, device: Device = "auto", precision: Precision = "auto"
) -> Iterator[httpx2.Client]:
    """A client of a service that serves the models beside this bundle, stopped at the end.

    Raises TrainingError with the service's own words where it doesn't become ready.
    """
    bundle = Bundle(folder)
    with tempfile.TemporaryDirectory() as state, open(Path(state) / "log", "w+") as log:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"]
            + ["--models", str(folder.parent.parent), "--port", str(port), "--device", device]
            + ["--precision", precision]
            + ["--database-url", f"sqlite:///{state}/rehearsal.sqlite"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        query = {"model": bundle.name, "version": str(bundle.version)}
        limits = httpx2.Limits(max_connections=CLIENTS)
        address = f"http://127.0.0.1:{port}"
        try:
            with httpx2.Client(
                base_url=address, params=query, limits=limits, timeout=900
            ) as client:
                _wait_until_ready(client, process)
                yield client
        except (httpx2.HTTPError, TimeoutError) as error:
            log.seek(0)
            raise TrainingError(f"the service failed: {error}\n{log.read()[-2000:]}") from error
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(client: httpx2.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx2.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError("not ready within 120 s" if process.poll() is None else "it stopped")


def _calibrate(client: httpx2.Client, held_out: list[Path], target_fpr: float) -> dict[str, Any]:
    files = [("images", (path.name, path.read_bytes())) for path in held_out]
    response = client.post("/v1/calibrate", files=files, params={"target_fpr": str(target_fpr)})
    return _checked(response, "calibration")


def _inspect_all(client: httpx2.Client, tests: list[TestImage]) -> list[dict[str, Any]]:
    def inspect(test: TestImage) -> dict[str, Any]:
        return _checked(_post(client, test, "none"), str(test.path))

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(inspect, tests)
        return list(progress(answers, total=len(tests), description="inspecting over HTTP"))


def _save_pictures(client: httpx2.Client, tests: list[TestImage], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    saved: dict[str, int] = {}
    for test in tests:
        saved[test.kind] = saved.get(test.kind, 0) + 1
        if saved[test.kind] <= PICTURES_PER_KIND:
            response = _post(client, test, "overlay", accept="image/jpeg")
            decision = response.headers["X-Decision"]
            (folder / f"{test.kind}-{test.path.stem}-{decision}.jpg").write_bytes(response.content)


def _post(
    client: httpx2.Client, test: TestImage, render: str, accept: str = "application/json"
) -> httpx2.Response:
    headers = {"Content-Type": "application/octet-stream", "Accept": accept}
    return client.post(
        "/v1/inspect", content=test.path.read_bytes(), params={"render": render}, headers=headers
    )


def _checked(response: httpx2.Response, what: str) -> dict[str, Any]:
    if response.is_error:
        raise TrainingError(f"{what}: HTTP {response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer

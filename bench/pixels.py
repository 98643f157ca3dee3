"""What surrounds the graph: decoding, pictures and uploads, beside the plain way of each.

    python -m bench.pixels [--out bench/results/pixels]

Works of one group take turns and are compared within each round with the group's first. Pictures
to decode are the README's good part, enlarged and saved as JPEG of quality 90; the map that is
rendered is the demo's of the README's cracked part.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from starlette.requests import Request
from starlette.types import Message

from bench.turns import timed
from service import heatmap, image, uploads
from service.bundle import Bundle
from service.detector import Detector
from training import files
from training.benchmark import hardware

SIZE = (256, 256)  # of the model
SIDES = {"512 x 512": (512, 512), "2448 x 1632": (1632, 2448), "5472 x 3648": (3648, 5472)}
SHOWN = (1200, 1920)
CHUNK = 65_536  # bytes; what uvicorn hands on at a time
BODY = 2_000_000
Works = dict[str, Callable[[], object]]
Row = dict[str, Any]


def decoding(side: tuple[int, int]) -> tuple[Works, float]:
    """The ways from a JPEG to the model's size, and how much reduced scale changes pixels."""
    part = image.read(Path("examples/normal.png"))
    large = cv2.resize(part, side[::-1], interpolation=cv2.INTER_CUBIC)
    data = _jpeg(large)

    def pillow() -> np.ndarray:
        resized = Image.fromarray(image.decode(data)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def whole() -> np.ndarray:
        return image.resize(image.decode(data), SIZE)

    def reduced() -> np.ndarray:
        return image.decode_to(data, SIZE)[0]

    difference = float(np.abs(whole().astype(int) - reduced()).mean())
    return {
        "whole, then Pillow's resizing": pillow,
        "whole, then resized": whole,
        "at reduced scale": reduced,
    }, difference


def pictures() -> Works:
    """Every picture of one inspection, of a part of 1920 x 1200."""
    bundle = Bundle(Path("models/demo/1"))
    detector = Detector(bundle.read_graph(), bundle.manifest.image_size, "cpu")
    calibration = bundle.default_calibration()
    assert calibration
    limit = calibration.threshold
    part = image.read(Path("examples/anomalous.png"))
    (prediction,) = detector.run(image.resize(part, bundle.manifest.image_size)[None])
    shown = cv2.resize(part, SHOWN[::-1], interpolation=cv2.INTER_CUBIC)
    found = prediction.anomaly_map
    return {
        "overlay, PNG (level 1)": lambda: heatmap.overlay(found, limit, shown, "image/png"),
        "overlay, JPEG (quality 90)": lambda: heatmap.overlay(found, limit, shown),
        "mask, PNG of one bit": lambda: heatmap.mask(found, limit, SHOWN),
        "heatmap 256 x 256, palette PNG (level 1)": lambda: heatmap.heatmap(found, limit),
    }


def taking_in() -> Works:
    """A body of 2 MB by Starlette's own form reader and by ours."""
    data = np.random.default_rng(0).bytes(BODY)
    head = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    form = head + data + b"\r\n--edge--\r\n"

    async def starlettes() -> None:
        async with _request(form, "multipart/form-data; boundary=edge").form() as fields:
            upload = fields["image"]
            assert not isinstance(upload, str) and await upload.read() == data

    async def ours(body: bytes, content_type: str) -> None:
        request = uploads.limited(_request(body, content_type), 2 * BODY)
        assert await uploads.image(request) == data

    return {
        "form, Starlette's reader": lambda: asyncio.run(starlettes()),
        "form": lambda: asyncio.run(ours(form, "multipart/form-data; boundary=edge")),
        "raw": lambda: asyncio.run(ours(data, "image/png")),
    }


def measure(rounds: int) -> list[Row]:
    rows = []
    for name, side in SIDES.items():
        works, difference = decoding(side)
        rows += _rows(f"JPEG of {name}", works, rounds)
        rows[-1]["mean_difference"] = difference
    rows += _rows("pictures", pictures(), rounds)
    return rows + _rows("upload of 2 MB", taking_in(), rounds)


def _rows(group: str, works: Works, rounds: int) -> list[Row]:
    return [
        {"group": group, "work": name, "ms": 1e3 * taken.seconds} | asdict(taken)
        for name, taken in timed(works, rounds).items()
    ]


def _jpeg(pixels: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1])


def _request(body: bytes, content_type: str) -> Request:
    chunks = iter([body[i : i + CHUNK] for i in range(0, len(body), CHUNK)])

    async def receive() -> Message:
        chunk = next(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    headers = [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def table(rows: Sequence[Row], told: str) -> str:
    lines = ["| | | ms | times as fast |", "|---|---|---|---|"]
    for row in rows:
        note = (
            f", mean difference {row['mean_difference']:.2f} of 255"
            if "mean_difference" in row
            else ""
        )
        lines.append(
            f"| {row['group']} | {row['work']}{note} | {row['ms']:.2f} "
            f"| {row['times_as_fast']:.2f} ({row['least']:.2f} to {row['most']:.2f}) |"
        )
    return "\n".join([*lines, "", told])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pixels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="turns of every work (default: 7)")
    add("--out", type=Path, metavar="DIR", help="write pixels.md and pixels.json here")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.rounds)
    told = (
        f"{hardware(torch.device('cpu'))}; OpenCV {cv2.__version__}; {date.today()}; one thread, "
        f"medians of {arguments.rounds} rounds (least to most)."
    )
    print(table(rows, told))
    if arguments.out:
        record = {"rows": rows, "told": told}
        files.write_json(arguments.out / "pixels.json", record, "--out")
        files.write_text(arguments.out / "pixels.md", table(rows, told) + "\n", "--out")
    return 0


if __name__ == "__main__":
    sys.exit(main())

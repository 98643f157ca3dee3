"""What every peer does with a picture: our decoding, the same graph, the same answer.

The bundle comes by the environment, since peers start processes of their own: BENCH_BUNDLE is its
folder. Imports of the service are those that need no more than numpy, pillow, opencv and pydantic.
"""

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from service import cores, heatmap, image
from service.bundle import Bundle
from service.calibration import decide

MAX_BATCH = 8  # the service's default
CORES = cores.available()


class Inspection:
    """The bundle in BENCH_BUNDLE on ONNX Runtime's CPU provider."""

    def __init__(self, threads: int) -> None:
        bundle = Bundle(Path(os.environ["BENCH_BUNDLE"]))
        calibration = bundle.default_calibration()
        assert calibration is not None
        self.threshold, self.size = calibration.threshold, bundle.manifest.image_size
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(
            bundle.read_graph(), options, providers=["CPUExecutionProvider"]
        )

    def decode(self, body: bytes) -> np.ndarray:
        """RGB uint8 (h, w, 3) at the model's size."""
        return image.decode_to(body, self.size)[0]

    def run(self, images: list[np.ndarray]) -> list[tuple[float, np.ndarray]]:
        """Score and anomaly map of each."""
        maps, scores = self._session.run(
            ["anomaly_map", "image_score"], {"image": np.stack(images)}
        )
        return list(zip(scores.tolist(), maps, strict=True))

    def answer(self, score: float, anomaly_map: np.ndarray, with_heatmap: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"score": score, "decision": decide(score, self.threshold)}
        if with_heatmap:
            png = heatmap.heatmap(anomaly_map, self.threshold)
            said["heatmap"] = base64.b64encode(png).decode()
        return said


def wants_heatmap(query: Any) -> bool:
    """Of a mapping of query parameters, as our own route has it."""
    return bool(query.get("render", "none") == "heatmap")

"""The graph on a device: uint8 images in; one score and one anomaly map per image out."""

from dataclasses import dataclass

import numpy as np

from service.devices import Device, Precision, open_session
from service.errors import BundleError, InferenceFailed, NoNumber


@dataclass(frozen=True)
class Prediction:
    score: float  # the map's maximum
    anomaly_map: np.ndarray  # float32 (h, w) at the model's size


class Detector:
    """A graph loaded on one device. `run` must be called by one thread at a time.

    Raises as `open_session`, and BundleError for a graph whose interface differs from
    `image -> anomaly_map, image_score`.
    """

    def __init__(
        self,
        graph: bytes,
        image_size: tuple[int, int],
        device: Device = "auto",
        threads: int = 0,
        precision: Precision = "auto",
        max_batch_size: int = 0,
    ) -> None:
        self.image_size = image_size
        self._session = open_session(graph, device, precision, threads, max_batch_size)
        self._check_interface()

    @property
    def device(self) -> str:
        """Which of the named devices it is."""
        return self._session.device

    @property
    def provider(self) -> str:
        return self._session.provider

    @property
    def precision(self) -> str:
        """What the convolutions are computed in."""
        return self._session.precision

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The sizes of batch that it is best at, ascending."""
        return self._session.batch_sizes

    @property
    def description(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        return f"{self.provider} in {self.precision}, batches of {sizes}"

    def batch_size(self, waiting: int) -> int:
        """How many of `waiting` images to run next: all, up to the largest size, where others are
        padded anyway; else the largest size that they fill."""
        if self._session.pads:
            return min(waiting, self.batch_sizes[-1])
        return max(size for size in self.batch_sizes if size <= waiting)

    def run(self, images: np.ndarray, *, aside: bool = False) -> list[Prediction]:
        """Predictions of uint8 (N, h, w, 3) RGB images at the model's size; `aside` while others
        compute, who are not to wait.

        Raises InferenceFailed with the runtime's reason, and NoNumber where a score or a pixel of
        one of them is none.
        """
        try:
            run = self._session.run_aside if aside else self._session.run
            maps, scores = run(images)
        except Exception as error:  # the runtimes raise many types with no common base
            raise InferenceFailed(f"{self.provider}: {error}") from error
        # A runtime's maximum may leave out what is no number, and the part would pass.
        if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
            raise NoNumber(f"{self.provider}: the graph gave a score that is no number")
        return [
            Prediction(float(score), anomaly_map)
            for score, anomaly_map in zip(scores, maps, strict=True)
        ]

    def warm_up(self, *, aside: bool = False) -> None:
        """Run on gray images, so that the first requests don't pay for memory and kernels; `aside`
        on one, as CPUs hardly take longer for a first one."""
        # The largest first: its memory serves the others.
        for size in (1,) if aside else reversed(self._session.warm_sizes):
            self.run(np.full((size, *self.image_size, 3), 128, np.uint8), aside=aside)

    def _check_interface(self) -> None:
        inputs, outputs = self._session.ports
        height, width = self.image_size
        if inputs != [("image", "uint8", (height, width, 3))]:
            raise BundleError(
                f"the graph's input must be image: uint8 (N, {height}, {width}, 3), is {inputs}"
            )
        expected = {"anomaly_map": "float32", "image_score": "float32"}
        if {name: dtype for name, dtype, _ in outputs} != expected:
            raise BundleError(
                f"the graph's outputs must be anomaly_map and image_score, float32; are {outputs}"
            )

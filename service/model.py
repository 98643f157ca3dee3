"""One version of a model, loaded and warm: bundle, detector, batcher and calibrations in force."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.batcher import Batcher
from service.bundle import Bundle
from service.calibration import Calibration
from service.detector import Detector
from service.store import Graph

Key = tuple[str, int]  # name and version


@dataclass(eq=False)
class Model:
    """A loaded version; whoever answers a request with it holds it, and its memory, that long."""

    bundle: Bundle
    detector: Detector
    batcher: Batcher
    own: Calibration | None  # its bundle's; None: an imported network came without
    trained: frozenset[str]  # digests of the files it was trained on
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)  # in force, by profile

    @property
    def graph(self) -> Graph:
        return Graph(self.name, self.bundle.version, self.bundle.digest)

    @property
    def key(self) -> Key:
        return self.name, self.bundle.version

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def calibration(self) -> Calibration | None:
        """What is in force where a request names no profile; None: nobody calibrated it yet."""
        return self.calibrations.get("") or self.own

    def calibration_for(self, profile: str) -> Calibration | None:
        """What is in force for a profile: its own, else the model's."""
        return self.calibrations.get(profile) or self.calibration

    @property
    def engine(self) -> str:
        """What scores depend on beside the graph."""
        return f"{self.detector.provider} in {self.detector.precision}"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.bundle.manifest.image_size


def tell_threshold(calibration: Calibration | None) -> str:
    """For the log."""
    if calibration is None:
        return "no threshold yet: calibrate it, or give one with each request"
    return (
        f"threshold {calibration.threshold:.4f} from {calibration.id}, "
        f"{calibration.samples} samples"
    )

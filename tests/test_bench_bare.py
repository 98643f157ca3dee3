"""The engine without HTTP: as many pictures under way as asked for, in batches as the service's."""

import json

import numpy as np
from conftest import SIZE, brightness_graph, encoded, spotted

from bench import bare
from service.detector import Detector, Prediction


class Recording(Detector):
    """Notes the size of every batch."""

    def __init__(self) -> None:
        super().__init__(brightness_graph(), SIZE, "cpu", threads=1)
        self.batches: list[int] = []

    def run(self, images: np.ndarray) -> list[Prediction]:
        self.batches.append(len(images))
        return super().run(images)


def test_no_batch_is_larger_than_the_services_or_than_what_is_under_way():
    detector = Recording()
    for clients, most in ((1, 1), (3, 3), (20, detector.batch_sizes[-1])):
        detector.batches.clear()
        found = bare.measure(
            detector, [encoded(spotted())], clients=clients, seconds=0.2, warm_up_s=0.05
        )
        assert max(detector.batches) <= most
        assert 0 < found.answered <= sum(detector.batches)
        assert found.errors == {}


def test_the_command_prints_what_the_load_generator_does(write_bundle, tmp_path, capsys):
    picture = tmp_path / "part.png"
    picture.write_bytes(encoded(spotted()))
    flags = ["--bundle", str(write_bundle().folder), "--image", str(picture), "--seconds", "0.1"]
    assert bare.main([*flags, "--warm-up", "0", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] > 0 and found["p50_ms"] > 0

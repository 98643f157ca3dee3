"""The engine without HTTP: decoding threads and a device thread, as the service has them.

    python -m bench.bare --bundle runs/bench/models/light/light/1 --image part.jpg --clients 8

What the service can reach at most: pictures come from memory, answers go nowhere.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import get_args

import numpy as np

from bench import load
from bench.load import Answer, now
from service import cores, image
from service.bundle import Bundle
from service.detector import Detector
from service.devices import Device


def measure(
    detector: Detector, pictures: Sequence[bytes], *, clients: int, seconds: float, warm_up_s: float
) -> load.Result:
    """As `load.measure` in the closed loop: `clients` pictures are under way at any time."""
    waiting: SimpleQueue[tuple[float, np.ndarray]] = SimpleQueue()
    encoded = cycle(pictures)
    answers: list[Answer] = []
    with ThreadPoolExecutor(cores.available()) as decoders, ThreadPoolExecutor(1) as device:

        def ask() -> None:
            decoders.submit(decode, now(), next(encoded))

        def decode(since: float, data: bytes) -> None:
            waiting.put((since, image.decode_to(data, detector.image_size)[0]))

        for _ in range(clients):
            ask()
        begin = now() + warm_up_s
        device.submit(_answer, detector, waiting, begin, ask, answers).result()
        answers.clear()
        before = load.usage(None)
        device.submit(_answer, detector, waiting, begin + seconds, ask, answers).result()
        after = load.usage(None)
    return load.summary(answers, seconds, before, after)


def _answer(
    detector: Detector,
    waiting: "SimpleQueue[tuple[float, np.ndarray]]",
    end: float,
    ask: Callable[[], None],
    answers: list[Answer],
) -> None:
    """Whatever waits is the next batch; each answer makes room for another question."""
    while now() < end:
        first = waiting.get()
        others = detector.batch_size(1 + waiting.qsize()) - 1
        batch = [first, *(waiting.get() for _ in range(others))]
        detector.run(np.stack([pixels for _, pixels in batch]))
        done = now()
        for since, _ in batch:
            answers.append(Answer(since, since, done, "200"))
            ask()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--bundle", type=Path, required=True)
    add("--image", type=Path, nargs="+", required=True, help="in turn")
    add("--clients", type=int, default=1, help="pictures under way (default: 1)")
    add("--seconds", type=float, default=5.0, help="that count (default: 5)")
    add("--warm-up", type=float, default=load.WARM_UP_S, help="seconds before")
    add("--device", choices=get_args(Device), default="auto")
    arguments = parser.parse_args(argv)

    bundle = Bundle(arguments.bundle)
    result = measure(
        Detector(bundle.read_graph(), bundle.manifest.image_size, arguments.device),
        [path.read_bytes() for path in arguments.image],
        clients=arguments.clients,
        seconds=arguments.seconds,
        warm_up_s=arguments.warm_up,
    )
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""BentoML with our decoding and graph: `bentoml serve bench.peers.bentoml:Inspect --port PORT`.

Set up as its documentation advises. docs.bentoml.com: "Adaptive batching" (`batchable`,
`max_batch_size`), "Parallelize requests handling" (a worker a core; one thread to each session),
"Input and output types" (files as `pathlib.Path`; a batchable route takes a list). It was slower
without batching, and with decoding and graph as two services.
"""

from pathlib import Path
from typing import Any

import bentoml

from bench.peers.inspection import CORES, MAX_BATCH, Inspection

Answers = list[dict[str, Any]]


@bentoml.service(workers=CORES)
class Inspect:
    def __init__(self) -> None:
        self.inspection = Inspection(threads=1)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)  # type: ignore[untyped-decorator]
    def inspect(self, images: list[Path]) -> Answers:
        return self._answers(images, False)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)  # type: ignore[untyped-decorator]
    def inspect_heatmap(self, images: list[Path]) -> Answers:
        return self._answers(images, True)

    def _answers(self, images: list[Path], with_heatmap: bool) -> Answers:
        found = self.inspection.run([self.inspection.decode(path.read_bytes()) for path in images])
        return [self.inspection.answer(*each, with_heatmap) for each in found]

"""LitServe with our decoding and graph: `python -m bench.peers.litserve PORT`.

Set up as its documentation advises. lightning.ai/docs/litserve: "Speed up serving by 200x" and
"Batching" (max_batch_size, batch_timeout), `LitServer`'s own text: for a CPU as many workers as
cores, `fast_queue` beyond 100 requests a second, as many API servers as workers. A worker a core
leaves one thread to each session. The body is taken raw, which spares it the JSON and base64 of its
examples.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Depends, Request

from bench.peers.inspection import CORES, MAX_BATCH, Inspection, wants_heatmap

BATCH_TIMEOUT_S = 0.001  # as fast under load as the 0.01 and 0.05 of its examples, sooner for one
Asked = tuple[bytes, bool]  # encoded picture, with heatmap


async def asked(request: Request) -> Asked:
    return await request.body(), wants_heatmap(request.query_params)


class InspectAPI(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.inspection = Inspection(threads=1)

    def decode_request(self, request: Annotated[Asked, Depends(asked)]) -> tuple[np.ndarray, bool]:
        body, with_heatmap = request
        return self.inspection.decode(body), with_heatmap

    def batch(self, inputs: list[tuple[np.ndarray, bool]]) -> list[tuple[np.ndarray, bool]]:
        return inputs

    def predict(self, inputs: list[tuple[np.ndarray, bool]]) -> list[dict[str, Any]]:
        found = self.inspection.run([pixels for pixels, _ in inputs])
        return [
            self.inspection.answer(score, anomaly_map, with_heatmap)
            for (score, anomaly_map), (_, with_heatmap) in zip(found, inputs, strict=True)
        ]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = InspectAPI(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S, api_path="/inspect")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=CORES, fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )

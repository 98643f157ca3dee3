"""Ray Serve with our decoding and graph: `python -m bench.peers.ray PORT`.

Set up as its documentation advises. docs.ray.io, Serve: "Performance Tuning" (a replica a core,
asynchronous methods), "Dynamic Request Batching" (`serve.batch`), "Asyncio and Concurrency best
practices" (blocking work on threads), "Enable High Throughput" (HAProxy and the throughput switch,
which must be in the environment before Ray is imported). Its
workers are as nice as any other process, and no server writes a line for each request.
"""

import asyncio
import os
import signal
import sys
from typing import Any

os.environ |= {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # its default is 15
}

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

from bench.peers.inspection import CORES, MAX_BATCH, Inspection, wants_heatmap

BATCH_WAIT_S = 0.001  # as fast under load as its default of 0.01, and sooner for one


@serve.deployment(
    num_replicas=CORES,
    max_ongoing_requests=64,
    ray_actor_options={"num_cpus": 1},
    logging_config={"enable_access_log": False},
)
class Inspect:
    def __init__(self) -> None:
        self.inspection = Inspection(threads=1)

    async def __call__(self, request: Request) -> dict[str, Any]:
        pixels = await asyncio.to_thread(self.inspection.decode, await request.body())
        score, anomaly_map = await self.run(pixels)
        return await asyncio.to_thread(
            self.inspection.answer, score, anomaly_map, wants_heatmap(request.query_params)
        )

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)  # type: ignore[untyped-decorator]
    async def run(self, images: list[np.ndarray]) -> list[tuple[float, np.ndarray]]:
        return await asyncio.to_thread(self.inspection.run, images)


if __name__ == "__main__":
    # A core more than there are: its own actors ask for one.
    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Inspect.bind(), route_prefix="/inspect")  # type: ignore[attr-defined]
    signal.sigwait({signal.SIGTERM})
    ray.shutdown()

"""Trains bare, without Ray, in processes of their own: what the benchmarks compare with.

    python -m benchmarks.bare '{"dataset": …, "config": …, "rank": 0, "world_size": 1, "threads": 2, …}'

Prints one JSON object: seconds of every epoch (validation included), images per second of its training part, and by how
many bytes the process grew at most beyond what it took before training.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.setup import peak_memory, spec_of_process
from pipeline.training import TrainConfig


def run_bare(
    config: TrainConfig, dataset: str, *, workers: int = 1, threads: int = 1, matmul_rounds: int = 0
) -> dict[str, Any]:
    """Trains with `workers` processes of `threads` threads each; returns what the first one measured."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "config": config.to_json(),
            "dataset": dataset,
            "world_size": workers,
            "threads": threads,
            "matmul_rounds": matmul_rounds,
            "rendezvous": f"file://{folder}/rendezvous",
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.bare", json.dumps({**spec, "rank": rank})],
                env=environment,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                cwd=Path(__file__).parents[1],
            )
            for rank in range(workers)
        ]
        output, _ = processes[0].communicate()
        if any(process.wait() for process in processes):
            raise RuntimeError("a bare training failed; its traceback is above")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main(spec: dict[str, Any]) -> None:
    """Trains as told, and prints what was measured."""
    import torch
    import torch.distributed as dist

    from benchmarks.timing import matmul_rate
    from pipeline.manifest import Manifest
    from pipeline.training import Training, Worker

    torch.set_num_threads(spec["threads"])
    if spec["world_size"] > 1:
        dist.init_process_group(
            "gloo", init_method=spec["rendezvous"], rank=spec["rank"], world_size=spec["world_size"]
        )
    training = Training(
        TrainConfig.from_json(spec["config"]),
        spec["dataset"],
        Manifest.load(spec["dataset"]),
        Worker(spec["rank"], spec["world_size"]),
    )
    before = psutil.Process().memory_info().rss
    ceilings: list[float] = []
    seconds: list[float] = []
    if spec["matmul_rounds"]:
        ceilings.append(matmul_rate())
    start = time.perf_counter()
    for _ in training.epochs():
        seconds.append(time.perf_counter() - start)
        if spec["matmul_rounds"]:
            ceilings.append(matmul_rate())
        start = time.perf_counter()
    rates = [epoch["throughput/train_images_per_second"] for epoch in training.history]
    grown = peak_memory() - before
    result = {"epoch_seconds": seconds, "images_per_second": rates, "matmul_rates": ceilings, "grown_bytes": grown}
    print(json.dumps(result), flush=True)
    if spec["world_size"] > 1:
        dist.destroy_process_group()
        # A DDP module that still refers to the group keeps gloo's threads alive, and one of them that wants the
        # interpreter while it shuts down aborts the process.
        os._exit(0)


if __name__ == "__main__":
    main(spec_of_process("benchmarks.bare", __doc__))

"""Measures this machine, and writes `benchmarks/results.json`.

Every row but the plain rates is a ratio of two things measured in this run, which can be compared between machines.
Images are random, of MNIST's shape; the network is the paper's.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import ray
import torch

from benchmarks.bare import middle, run_bare
from infusion_core.model import ModelConfig
from infusion_core.sampling import sample_batches
from pipeline.local_servers import BUCKET
from pipeline.local_services import LocalServices
from pipeline.manifest import Manifest
from pipeline.presets import mnist
from pipeline.shards import load_rows
from pipeline.training import TrainConfig, new_model

RESULTS = Path(__file__).with_name("results.json")
THREADS = 2
STEPS_PER_EPOCH = 6
BATCH = 512


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    value: float
    unit: str
    goal: str
    note: str


def training_flops_per_image(model: ModelConfig) -> float:
    """Counts the matrix products of a training step: forward, and backward to weights and to inputs.

    The first layer's input needs no gradient.
    """
    widths = [model.dimensions, *model.hidden_sizes, 2 * model.dimensions]
    weights = [inputs * outputs for inputs, outputs in pairwise(widths)]
    return model.num_steps * 2 * (3 * sum(weights) - weights[0])


def short(epochs: int, num_steps: int = 15) -> TrainConfig:
    """Returns the paper's configuration for a few epochs."""
    config = mnist()
    return dataclasses.replace(
        config,
        epochs=epochs,
        global_batch=BATCH,
        statistics_images=BATCH,
        model=dataclasses.replace(config.model, num_steps=num_steps),
    )


def main() -> int:
    """Runs all benchmarks; returns the exit status."""
    if sys.argv[1:]:
        print(__doc__ or "")
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    rows: list[Row] = []

    def add(name: str, value: float, unit: str, goal: str, note: str) -> None:
        rows.append(Row(name, value, unit, goal, note))
        print(f"{name:<34} {value:>12,.3f} {unit:<10} {goal or '-':<8} {note}", flush=True)

    print(f"{'name':<34} {'value':>12} {'unit':<10} {'goal':<8} note")
    with tempfile.TemporaryDirectory(prefix="infusion-bench-") as name:
        services = LocalServices(Path(name), ports="free")
        try:
            services.up()
            os.environ.update(services.env())
            measure(Path(name), add)
        finally:
            # A process that is still joined to a cluster ends with it.
            ray.shutdown()
            services.down(delete_data=True)
    RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(f"written to {RESULTS}")
    return 0


def measure(folder: Path, add: Callable[[str, float, str, str, str], None]) -> None:
    """Takes all measurements, one after the other."""
    from mlflow import MlflowClient

    from pipeline import cluster
    from pipeline.ray_training import Resources, train
    from pipeline.sources import SourceOptions, open_source
    from pipeline.staging import stage

    rng = np.random.default_rng(0)
    train_images, rest = STEPS_PER_EPOCH * BATCH, 512
    small = folder / "small.npz"
    np.savez(
        small,
        train_images=rng.integers(0, 256, (train_images + rest, 28, 28), np.uint8),
        test_images=rng.integers(0, 256, (rest, 28, 28), np.uint8),
    )
    large = folder / "large.npz"
    np.savez(
        large,
        train_images=rng.integers(0, 256, (60_000, 28, 28), np.uint8),
        test_images=rng.integers(0, 256, (10_000, 28, 28), np.uint8),
    )
    dataset = f"s3://{BUCKET}/bench/small"
    fraction = SourceOptions(valid_fraction=rest / (train_images + rest))
    stage(open_source(f"npz:{small}", fraction), dataset)

    start = time.perf_counter()
    staged = stage(open_source(f"npz:{large}"), f"s3://{BUCKET}/bench/large")
    seconds = time.perf_counter() - start
    add("stage_images_per_second", 70_000 / seconds, "images/s", "", "28 × 28, from .npz to S3 with manifest")
    manifest = Manifest.load(staged.dataset)
    start = time.perf_counter()
    load_rows(staged.dataset, manifest, "train", 0, manifest.rows("train"))
    read_rate = manifest.rows("train") / (time.perf_counter() - start)

    bare = run_bare(short(5), dataset, threads=THREADS, matmul_rounds=1)
    rate, ceiling = middle(bare["images_per_second"]), median(bare["matmul_rates"])
    achieved = rate * training_flops_per_image(short(1).model)
    add(
        "train_flops_over_matmul_ceiling",
        achieved / ceiling,
        "ratio",
        "≥ 0.80",
        f"{achieved / 1e9:.0f} of {ceiling / 1e9:.0f} GFLOP/s with {THREADS} threads; {rate:.0f} images/s",
    )
    add("shard_read_over_training", read_rate / rate, "ratio", "≥ 10", f"{read_rate:,.0f} images/s read from S3")

    plain = run_bare(short(5), dataset, threads=THREADS)
    cluster.connect()
    name = "bench"
    train(short(5), dataset, f"s3://{BUCKET}/bench/runs", name, Resources(num_workers=1, threads_per_worker=THREADS))
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("infusion-small").experiment_id])  # type: ignore[union-attr]
    times = [point.timestamp / 1000 for point in client.get_metric_history(run.info.run_id, "train/objective")]
    ray_seconds = [later - earlier for earlier, later in pairwise(times)]
    add(
        "ray_epoch_over_bare",
        median(ray_seconds) / middle(plain["epoch_seconds"]),
        "ratio",
        "≤ 1.02",
        f"{median(ray_seconds):.2f} s with tracking and checkpoints; bare {middle(plain['epoch_seconds']):.2f}",
    )

    two = run_bare(short(4), dataset, workers=2, threads=1)
    one = run_bare(short(4), dataset, workers=1, threads=2)
    add(
        "ddp_2x1_over_1x2",
        middle(two["images_per_second"]) / middle(one["images_per_second"]),
        "ratio",
        "≥ 0.95",
        "two workers × one thread over one × two, normalisation synchronised",
    )

    grown = {steps: run_bare(short(1, num_steps=steps), dataset, threads=THREADS)["grown_bytes"] for steps in (15, 60)}
    add(
        "peak_memory_T60_over_T15",
        grown[60] / grown[15],
        "ratio",
        "≤ 1.1",
        f"growth by training: {grown[60] / 2**20:.0f} over {grown[15] / 2**20:.0f} MiB",
    )

    torch.set_num_threads(THREADS)
    model = new_model(short(1), manifest).eval()
    for _ in sample_batches(model, 1000, 0):
        pass
    start = time.perf_counter()
    for _ in sample_batches(model, 4000, 0):
        pass
    sampled = 4000 / (time.perf_counter() - start)
    add("samples_per_second", sampled, "samples/s", "", f"T = 15, {THREADS} threads")


if __name__ == "__main__":
    raise SystemExit(main())

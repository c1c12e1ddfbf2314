"""Measures what goes through S3, MLflow and Ray."""

from itertools import pairwise
from pathlib import Path
from statistics import median

import ray
from mlflow import MlflowClient

from benchmarks.bare import run_bare
from benchmarks.images import measure_images
from benchmarks.search import measure_search
from benchmarks.setup import THREADS, Add, random_images, short, stage_epoch
from benchmarks.startup import measure_startup
from benchmarks.timing import middle
from pipeline import cluster
from pipeline.local_servers import BUCKET
from pipeline.ray_training import Resources, train
from pipeline.sources import open_source
from pipeline.staging import stage

# What an epoch costs once (a checkpoint, a report) is measured in epochs as long as those of the paper: 50,000 images.
RAY_STEPS_PER_EPOCH = 97
RAY_EPOCHS = 2


def measure_machinery(folder: Path, train_rate: float, add: Add) -> None:
    """Takes the measurements, one after the other; S3, MLflow and Ray are up."""
    measure_images(folder, train_rate, add)
    dataset = stage_epoch(folder, f"s3://{BUCKET}/bench/epoch", RAY_STEPS_PER_EPOCH)
    cluster.connect()
    try:
        # Bare before and after: the machine's speed drifts by more than what is measured.
        before = middle(run_bare(short(RAY_EPOCHS), dataset, threads=THREADS)["epoch_seconds"])
        on_ray = ray_epoch_seconds("bench", dataset)
        after = middle(run_bare(short(RAY_EPOCHS), dataset, threads=THREADS)["epoch_seconds"])
        bare = (before + after) / 2
        add(
            "ray_epoch_over_bare",
            on_ray / bare,
            "ratio",
            "≤ 1.02",
            f"{on_ray:.2f} s with tracking and checkpoints; bare {before:.2f} before and {after:.2f} after, beside the "
            "same services",
        )
        small = stage(open_source(random_images(folder / "small.npz", 1024, 128)), f"s3://{BUCKET}/bench/small").dataset
        measure_startup(small, add)
        measure_search(small, add)
    finally:
        # A process that is still joined to a cluster ends with it.
        ray.shutdown()


def ray_epoch_seconds(name: str, dataset: str) -> float:
    """Trains on Ray as a job does; returns the seconds of an epoch, all told."""
    train(
        short(RAY_EPOCHS),
        dataset,
        f"s3://{BUCKET}/bench/runs",
        name,
        Resources(num_workers=1, threads_per_worker=THREADS),
    )
    client = MlflowClient()
    experiment = client.get_experiment_by_name("infusion-epoch")
    assert experiment is not None, "train has just logged to it"
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    times = [point.timestamp / 1000 for point in client.get_metric_history(run.info.run_id, "train/objective")]
    return median(later - earlier for earlier, later in pairwise(times))

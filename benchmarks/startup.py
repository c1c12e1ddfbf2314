"""Measures what a training job costs before its first step, and where that goes, as the job itself records it."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from mlflow import MlflowClient

from benchmarks.setup import REPEATS, Add
from pipeline.local_servers import BUCKET

PARTS = ("job", "workers", "images", "first_step")


def measure_startup(dataset: str, add: Add) -> None:
    """Takes the measurements, one after the other; S3, MLflow and Ray are up.

    Args:
        dataset: small images of 28 × 28, so that reading them is no part of it.
        add: takes the rows.
    """
    for workers in (1, 2):
        runs = [_startup(dataset, f"startup-{workers}-{number}", workers) for number in range(REPEATS)]
        seconds = {part: median(run[part] for run in runs) for part in PARTS}
        add(
            f"job_start_{workers}_workers_seconds",
            sum(seconds.values()),
            "s",
            "",
            "from the job's process to its first step: "
            f"imports, checks and the run {seconds['job']:.1f}, workers {seconds['workers']:.1f}, "
            f"model and images {seconds['images']:.1f}, first step {seconds['first_step']:.1f}",
        )


def _startup(dataset: str, name: str, workers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "jobs.train", dataset, "--runs", f"s3://{BUCKET}/bench/runs", "--name", name]
    options = ["--preset", "digits", "--image-shape", "28,28,1", "--levels", "256", "--epochs", "1", "--json"]
    done = subprocess.run(
        [*command, *options, "--num-workers", str(workers)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    run_id = json.loads(done.stdout)["mlflow_run"].rpartition("/")[2]
    metrics = MlflowClient().get_run(run_id).data.metrics
    return {part: metrics[f"startup/{part}_seconds"] for part in PARTS}

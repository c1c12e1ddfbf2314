"""What every worker of a training does under Ray Train: trains, reports, and at the end makes the finished model.

A worker's start is part of every training's time: what only the first worker needs, MLflow and pictures, is imported
where it is used.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device
from ray.train.v2._internal.execution import context as ray_context

from infusion_core.model import CONFIG_FILE, WEIGHTS_FILE, save_model
from infusion_core.pixels import dequantise
from pipeline import storage
from pipeline.bound_evaluation import load_chunks
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.training import EpochReport, TrainConfig, Training, Worker, bound_metrics

if TYPE_CHECKING:
    from pipeline.tracking import TrackedRun

OUTCOME_FILE = "outcome.json"
MODEL_FOLDER = "model"
FIRST_STEP_AT = "first_step_at"
PICTURED_CHAINS = 8
SYSTEM_METRICS_INTERVAL_SECONDS = 5


def train_worker(spec: dict[str, Any]) -> None:
    """Trains as one worker of the group that this process belongs to.

    Args:
        spec: `config` (of the training), `dataset`, `folder` (of the run), `label` (for progress), `run` (the fields of
            its `TrackedRun`), `threads`, `memory_limit` (bytes for images, or `None`), `asked_at` (when the group was
            asked for, in seconds since 1970), and, if the finished model is to be tested, `test`.
    """
    began_at = time.time()
    # It prints every report in full, by a logger of its own to which Ray Train's `LoggingConfig` does not extend.
    ray_context.logger.setLevel(logging.WARNING)
    torch.set_num_threads(spec["threads"])
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device())
    chief = worker.rank == 0
    training = Training(
        TrainConfig.from_json(spec["config"]),
        spec["dataset"],
        Manifest.load(spec["dataset"]),
        worker,
        spec["memory_limit"],
    )
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            training.restore(Path(folder))
    if chief:
        resumed = f", going on after epoch {training.epoch}" if training.epoch else ""
        sys.stderr.write(
            f"{spec['label']}: {worker.world_size} workers, images in {training.images.placement}{resumed}\n"
        )
    with _system_metrics(spec["run"], context.get_node_rank(), context.get_local_rank() == 0):
        unlogged: list[tuple[int, dict[str, float]]] = []
        first_step_at: list[float] = []
        ready_at = time.time()
        if training.epoch:
            # The report that belongs to the checkpoint may have been lost with whoever waited for it.
            ray.train.report({FIRST_STEP_AT: 0.0, **training.history[-1]})
        for report in _with_progress(training, spec["label"], chief, first_step_at):
            unlogged.append((report.epoch, report.metrics))
            if chief and report.epoch == 1:
                unlogged.append((0, _startup(spec["asked_at"], began_at, ready_at, *first_step_at)))
            if not report.validated:
                continue
            if chief:
                log_epochs(training, unlogged, spec["run"], report.pictures_due)
            unlogged.clear()
            _report(training, report, chief, first_step_at)
        metrics = final_metrics(training, test=spec.get("test", False))
    if chief:
        write_outcome(training, metrics, spec["folder"])


def _startup(asked_at: float, began_at: float, ready_at: float, first_step_at: float) -> dict[str, float]:
    """Returns where the time went before the first step was taken."""
    return {
        "startup/workers_seconds": began_at - asked_at,
        "startup/images_seconds": ready_at - began_at,
        "startup/first_step_seconds": first_step_at - ready_at,
    }


def _with_progress(training: Training, label: str, chief: bool, first_step_at: list[float]) -> Iterator[EpochReport]:
    """Trains, and notes when the chief's first step was taken."""
    if not chief:
        yield from training.epochs()
        return
    batch = training.config.global_batch
    images_per_epoch = training.steps_per_epoch * batch
    total, done = training.config.epochs * images_per_epoch, training.epoch * images_per_epoch
    with Progress(f"train {label}", total, "images", done=done, interval=10) as progress:
        bound = ""

        def on_step() -> None:
            if not first_step_at:
                first_step_at.append(time.time())
            progress.advance(batch, note=f"epoch {training.epoch} of {training.config.epochs}{bound}")

        for report in training.epochs(on_step):
            if report.validated:
                bound = f"; valid lower bound {report.metrics['valid/lower_bound']:.2f} nats after epoch {report.epoch}"
            yield report


def final_metrics(training: Training, *, test: bool) -> dict[str, float]:
    """Makes `training.model` the finished one, and returns what is measured of it.

    These are the bounds over the validation split, and the test split if it is asked for, and on the first worker the
    Parzen-window estimate, if the training makes any.
    """
    metrics = bound_metrics("valid", training.finish(), training.config.model)
    if test and training.manifest.rows("test"):
        metrics |= bound_metrics("test", training.test(), training.config.model)
    bandwidth = training.config.parzen_bandwidth
    if bandwidth is not None and training.worker.rank == 0:
        metrics["valid/parzen"] = training.parzen(bandwidth)
    return metrics


def _report(training: Training, report: EpochReport, chief: bool, first_step_at: list[float]) -> None:
    metrics = {"epoch": report.epoch, FIRST_STEP_AT: sum(first_step_at), **report.metrics}
    if not chief:
        ray.train.report(metrics, checkpoint=None, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    training.save(folder)
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def log_epochs(
    training: Training, metrics: list[tuple[int, dict[str, float]]], run: Mapping[str, str], pictures_due: bool
) -> None:
    """Logs the metrics of epochs to a run, and pictures of the current model if they are due.

    Args:
        training: the training.
        metrics: by epoch.
        run: the fields of a `TrackedRun`.
        pictures_due: whether pictures are drawn.
    """
    from pipeline.tracking import TrackedRun

    tracked = TrackedRun(**run)
    tracked.log_metrics(metrics)
    if pictures_due:
        _log_pictures(training, tracked)


def _log_pictures(training: Training, run: "TrackedRun") -> None:
    """Logs sampling chains (Figure 1) and infusion chains (Figure 2) of the current model."""
    from pipeline.figures import infusion_chains_picture, png, sampling_chains_picture

    noise = training.picture_noise()
    _, images = next(iter(load_chunks(training.dataset, training.manifest, "valid", range(1))))
    targets = dequantise(images[:PICTURED_CHAINS].to(training.worker.device), training.manifest.levels, noise)
    training.model.eval()
    for kind, picture in (
        ("sampling_chains", sampling_chains_picture(training.model, noise, chains=PICTURED_CHAINS)),
        ("infusion_chains", infusion_chains_picture(training.model, targets, noise)),
    ):
        run.log_file(f"pictures/{kind}/epoch-{training.epoch:05d}.png", png(picture))


@contextmanager
def _system_metrics(run: Mapping[str, str], node: int, wanted: bool) -> Iterator[None]:
    """Logs the load of this node's processors, memory, network and GPUs while the block runs."""
    if not wanted:
        yield
        return
    from mlflow.exceptions import MlflowException
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run["run_id"], SYSTEM_METRICS_INTERVAL_SECONDS, resume_logging=True, node_id=f"node-{node}"
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
        # The sample that it was waiting with, which it drops, is all that there is of a short run.
        with suppress(MlflowException):
            monitor.publish_metrics(monitor.aggregate_metrics())
            monitor.mlflow_logger.flush()


def write_outcome(training: Training, metrics: Mapping[str, float], folder: str) -> None:
    """Writes the finished model and what there is to say of it into the run's folder."""
    with tempfile.TemporaryDirectory() as temporary:
        save_model(training.model, Path(temporary))
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            storage.write_bytes(storage.join(folder, MODEL_FOLDER, file), (Path(temporary) / file).read_bytes())
    outcome = {"best_epoch": training.best_epoch, "metrics": metrics, "history": training.history}
    storage.write_bytes(storage.join(folder, OUTCOME_FILE), json.dumps(outcome, indent=2).encode())

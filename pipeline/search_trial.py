"""One trial of a search: a training that Ray Tune runs from validation to validation, and may stop in between.

A trial that needs one device trains in Tune's own trial process (`DeviceTrial`), which the next trial takes over: what
is imported once is there. One that needs several has a group of Ray Train workers (`GroupTrial`).

Both keep their checkpoints in the trial's own folder, so that a trial goes on from there whoever starts it: Tune after
a pause or a failure, or another search of the same name after this one was killed. What such a trial reports first is
where it is.

A trial that diverges, or whose configuration cannot be trained, reports that it has failed. One that storage or MLflow
let down raises, which Tune takes for its death: it is tried again from its last checkpoint.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from infusion_core.errors import InfusionError
from infusion_core.sampling import sample_batches
from pipeline import storage
from pipeline.devices import local_device
from pipeline.errors import ServiceError, UserError
from pipeline.figures import png, samples_picture
from pipeline.manifest import Manifest
from pipeline.ray_failures import first_cause, user_error
from pipeline.search_state import SAMPLES_FILE
from pipeline.train_worker import FIRST_STEP_AT, final_metrics, log_epochs, train_worker, write_outcome
from pipeline.training import EpochReport, TrainConfig, Training, Worker

CHECKPOINT_FILE = "checkpoint.json"
SAMPLES = 10

EPOCH = "epoch"
BOUND = "valid/lower_bound"
PARZEN = "valid/parzen"
FAILURE = "failure"


@dataclass(frozen=True)
class TrialSpec:
    """All that a trial's process needs to know.

    Attributes:
        point: the trial's name.
        config: of its training, as JSON.
        dataset: address of the staged data set.
        folder: in which it keeps its files.
        run: the fields of its `TrackedRun`.
        num_workers: workers of its group; 1 trains in the trial's own process.
        threads_per_worker: CPU threads of each.
        gpus_per_worker: share of a GPU that each has; 0 for none.
        memory_limit: bytes of memory that a worker's images may occupy; `None` for half of what is free.
    """

    point: str
    config: dict[str, Any]
    dataset: str
    folder: str
    run: dict[str, str]
    num_workers: int = 1
    threads_per_worker: int = 1
    gpus_per_worker: float = 0.0
    memory_limit: int | None = None


class DeviceTrial(tune.Trainable):
    """A trial in one process, on one device or a share of it."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], specs: Mapping[str, TrialSpec]
    ) -> None:
        """Opens a trial, from its last checkpoint if it has one.

        Args:
            config: the trial's name, `point`.
            specs: of all trials of the search, by name.
        """
        self._specs = specs
        self._open(specs[config["point"]])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Opens another trial in this process."""
        self._open(self._specs[new_config["point"]])
        return True

    def _open(self, spec: TrialSpec) -> None:
        torch.set_num_threads(spec.threads_per_worker)
        self._spec = spec
        self._first_step_at = 0.0
        # Nothing of the trial before may be held while this one's images and model need the memory.
        self._training: Training | None = None
        self._epochs: Iterator[EpochReport] = iter(())
        self._resumed = False
        try:
            training = Training(
                TrainConfig.from_json(spec.config),
                spec.dataset,
                Manifest.load(spec.dataset),
                Worker(device=local_device(spec.gpus_per_worker > 0)),
                spec.memory_limit,
            )
            self._resumed = _restore(training, spec.folder)
        except ServiceError:
            raise
        except (UserError, InfusionError) as error:
            self._failure = str(error)
            return
        self._training = training
        self._epochs = training.epochs(self._note_first_step)

    def _note_first_step(self) -> None:
        self._first_step_at = self._first_step_at or time.time()

    def step(self) -> dict[str, Any]:
        """Trains up to the next validation, or says where a resumed trial is."""
        training = self._training
        if training is None:
            return {FAILURE: self._failure, EPOCH: 0, "done": True}
        try:
            metrics = self._where_it_is(training) if self._resumed else self._train(training)
            if training.epoch == training.config.epochs:
                write_outcome(training, final_metrics(training, test=True), self._spec.folder)
        except ServiceError:
            raise
        except (UserError, InfusionError) as error:
            return {FAILURE: str(error), EPOCH: training.epoch, "done": True}
        return self._result(training, metrics)

    def _where_it_is(self, training: Training) -> Mapping[str, float]:
        self._resumed = False
        return training.history[-1]

    def _train(self, training: Training) -> Mapping[str, float]:
        """Trains up to the next validation, and keeps what has been reached."""
        unlogged: list[tuple[int, dict[str, float]]] = []
        report: EpochReport | None = None
        for report in self._epochs:
            unlogged.append((report.epoch, report.metrics))
            if report.validated:
                break
        assert report is not None, "Tune asks for no more of a trial that has ended"
        # What a checkpoint has behind it is not trained again, and could not be logged any more.
        log_epochs(training, unlogged, self._spec.run, report.pictures_due)
        _save(training, self._spec.folder)
        return report.metrics

    def _result(self, training: Training, metrics: Mapping[str, float]) -> dict[str, Any]:
        return {
            **metrics,
            EPOCH: training.epoch,
            # The axis of TensorBoard's curves.
            "timesteps_total": training.epoch,
            FIRST_STEP_AT: self._first_step_at,
            "done": training.epoch == training.config.epochs,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:  # noqa: ARG002
        """Tells Tune, which wants something to keep of a trial that pauses, that all is kept already."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Does nothing: the trial was opened at its last checkpoint."""


def _save(training: Training, folder: str) -> None:
    """Writes a checkpoint; the one before is deleted only when this one is whole."""
    name = f"checkpoint-{training.epoch:05d}"
    with tempfile.TemporaryDirectory() as temporary:
        training.save(Path(temporary))
        for file in sorted(Path(temporary).rglob("*")):
            if file.is_file():
                storage.write_bytes(storage.join(folder, name, *file.relative_to(temporary).parts), file.read_bytes())
    before = _checkpoint(folder)
    storage.write_bytes(storage.join(folder, CHECKPOINT_FILE), json.dumps({"checkpoint": name}).encode())
    if before not in (None, name):
        storage.delete_folder(storage.join(folder, str(before)))
    (samples,) = sample_batches(training.model.eval(), SAMPLES, training.config.seed)
    storage.write_bytes(storage.join(folder, SAMPLES_FILE), png(samples_picture(samples.clamp(0, 1), SAMPLES)))


def _restore(training: Training, folder: str) -> bool:
    """Goes back to the last checkpoint; returns whether there was one."""
    name = _checkpoint(folder)
    if name is None:
        return False
    address = storage.join(folder, name)
    with tempfile.TemporaryDirectory() as temporary:
        for file in storage.list_files(address):
            target = Path(temporary, file.removeprefix(f"{address}/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(file))
        training.restore(Path(temporary))
    return True


def _checkpoint(folder: str) -> str | None:
    try:
        return str(json.loads(storage.read_bytes(storage.join(folder, CHECKPOINT_FILE)))["checkpoint"])
    except FileNotFoundError:
        return None


class GroupTrial(tune.Trainable):
    """A trial in a group of Ray Train workers, as `jobs.train` starts them."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], specs: Mapping[str, TrialSpec]
    ) -> None:
        """Starts the group; it goes on from its last checkpoint if it has one. Arguments as in `DeviceTrial`."""
        spec = specs[config["point"]]
        self._epochs = int(spec.config["epochs"])
        self._reports: Queue = Queue(actor_options={"num_cpus": 0})
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, args=(spec,), daemon=True)
        self._thread.start()

    def _fit(self, spec: TrialSpec) -> None:
        store, _, name = spec.folder.rpartition("/")
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": spec.config,
                "dataset": spec.dataset,
                "folder": spec.folder,
                "label": spec.point,
                "run": spec.run,
                "threads": spec.threads_per_worker,
                "memory_limit": spec.memory_limit,
                "asked_at": time.time(),
                "test": True,
            },
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers,
                use_gpu=spec.gpus_per_worker > 0,
                resources_per_worker=resources_per_worker(spec.threads_per_worker, spec.gpus_per_worker),
            ),
            run_config=RunConfig(  # type: ignore[call-arg]
                name=name,
                storage_path=store,
                # It is the search that counts deaths, and starts the group again.
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                callbacks=[_ForwardReports(self._reports)],  # type: ignore[list-item]
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self._error = error
        self._reports.put(None)

    def step(self) -> dict[str, Any]:
        """Waits for the group's next report."""
        report = self._reports.get()
        if report is None or report[EPOCH] == self._epochs:
            # The finished model is made after the last report.
            self._thread.join()
            if self._error is not None:
                return self._failed(self._error, 0 if report is None else report[EPOCH])
        assert report is not None, "a group that ends without its last report has failed"
        return {**report, "timesteps_total": report[EPOCH], "done": report[EPOCH] == self._epochs}

    def _failed(self, error: BaseException, epoch: int) -> dict[str, Any]:
        cause = user_error(error)
        if cause is None or isinstance(cause, ServiceError):
            # Of what it is raised from, the line with the reason would be the last that is shown.
            raise RuntimeError(f"the group of workers ended before its trial: {first_cause(error)}") from None
        return {FAILURE: str(cause), EPOCH: epoch, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:  # noqa: ARG002
        """See `DeviceTrial.save_checkpoint`."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """See `DeviceTrial.load_checkpoint`."""


class _ForwardReports(UserCallback):
    """Passes what the group reports on to its trial."""

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        self._reports.put(metrics[0])


def resources_per_worker(threads: int, gpus: float) -> dict[str, float]:
    """Returns the Ray resources of one worker of a trial."""
    return {"CPU": float(threads)} | ({"GPU": gpus} if gpus else {})

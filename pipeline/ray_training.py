"""Training on a Ray cluster: workers, checkpoints on S3, the MLflow run, and the registered model.

A run has a name and a folder, `STORAGE/NAME`. In it lie Ray Train's checkpoints, `run.json` (what was asked for, the
MLflow run, and the outcome once there is one) and the finished model. Submitting a name again goes on from its last
checkpoint.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer, get_device

from infusion_core.model import CONFIG_FILE, WEIGHTS_FILE, InfusionModel, load_model, save_model
from infusion_core.pixels import dequantise
from pipeline import cluster, registry, storage, tracking
from pipeline.bound_evaluation import load_chunks
from pipeline.errors import UserError
from pipeline.figures import infusion_chains_picture, png, sampling_chains_picture, training_curves
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.tracking import TrackedRun
from pipeline.training import EpochReport, TrainConfig, Training, Worker, bound_metrics, check_fit

PICTURED_CHAINS = 8
SYSTEM_METRICS_INTERVAL_SECONDS = 5

_RUN_FILE = "run.json"
_OUTCOME_FILE = "outcome.json"
_MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a training runs on; it changes how fast results come, not what they are called.

    Attributes:
        num_workers: DDP workers.
        use_gpu: one GPU a worker instead of CPUs alone.
        threads_per_worker: CPU threads that a worker computes with, and CPUs that are reserved for it.
        max_failures: how often a group of workers that died is started again from its last checkpoint.
        shard_memory_mib: MiB of memory that a worker's images may occupy before they are streamed instead; by default
            half of what is free.
    """

    num_workers: int = 1
    use_gpu: bool = False
    threads_per_worker: int = 1
    max_failures: int = 3
    shard_memory_mib: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 1), ("threads_per_worker", 1), ("max_failures", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def per_worker(self) -> dict[str, float]:
        """The Ray resources of one worker."""
        return {"CPU": float(self.threads_per_worker)} | ({"GPU": 1.0} if self.use_gpu else {})


@dataclass(frozen=True)
class TrainResult:
    """What a training made, and where it is.

    Attributes:
        run: name of the run.
        model: address of the registered model.
        challenger: the alias that points at it.
        mlflow_run: the run in the browser.
        folder: checkpoints and finished model.
        best_epoch: epoch of the best validation bound, whose model this is.
        valid_lower_bound: of the finished model, nats per image.
        valid_bits_per_dimension: the same in bits.
        variance_floor: that these figures were reached with.
        train_images_per_second: median over the epochs of the last submission.
    """

    run: str
    model: str
    challenger: str
    mlflow_run: str
    folder: str
    best_epoch: int
    valid_lower_bound: float
    valid_bits_per_dimension: float
    variance_floor: float
    train_images_per_second: float


def train(config: TrainConfig, dataset: str, store: str, name: str, resources: Resources) -> TrainResult:
    """Trains a model on the cluster and registers it as `challenger`, or goes on with a run of that name.

    Args:
        config: what to compute.
        dataset: address of the staged data set.
        store: where runs are kept.
        name: of the run.
        resources: what to run on.

    Raises:
        UserError: something that the user can mend is wrong; nothing was started, or what there is can be resumed.
    """
    for uri in (dataset, store):
        storage.check_reachable(uri)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    check_fit(config, dataset, manifest, resources.num_workers)
    folder = storage.join(store, name)
    earlier = _read_json(storage.join(folder, _RUN_FILE))
    if earlier is not None:
        _check_same(earlier, config, manifest, name)
        if "result" in earlier:
            return TrainResult(**earlier["result"])
    cluster.connect()
    cluster.check_capacity(resources.num_workers, resources.per_worker)
    with tracking.owned_run(
        registry.model_name(manifest.name),
        name,
        params={**flat(config), "dataset": dataset, "dataset_fingerprint": manifest.origin.fingerprint},
        tags={
            "mlflow.source.git.commit": tracking.git_commit(),
            "mlflow.source.name": "jobs.train",
            "folder": folder,
            **{key: str(value) for key, value in asdict(resources).items()},
        },
        resume=TrackedRun(**earlier["mlflow_run"]) if earlier else None,
    ) as run:
        record = {
            "config": config.to_json(),
            "dataset": dataset,
            "dataset_fingerprint": manifest.origin.fingerprint,
            "mlflow_run": asdict(run),
        }
        run.log_file("config.json", _json({**record, "resources": asdict(resources)}))
        run.log_file("manifest.json", manifest.to_json().encode())
        storage.write_bytes(storage.join(folder, _RUN_FILE), _json(record))
        _fit(config, dataset, store, name, resources, run)
        result = _register(config, manifest, folder, name, run)
        storage.write_bytes(storage.join(folder, _RUN_FILE), _json({**record, "result": asdict(result)}))
    return result


def flat(config: TrainConfig) -> dict[str, object]:
    """Returns the fields of a configuration and its model side by side."""
    fields = asdict(config)
    return {**fields.pop("model"), **fields}


def _check_same(earlier: Mapping[str, Any], config: TrainConfig, manifest: Manifest, name: str) -> None:
    before = flat(TrainConfig.from_json(earlier["config"]))
    changed = [
        f"{key} was {before[key]} and is now {value}" for key, value in flat(config).items() if before[key] != value
    ]
    if earlier["dataset_fingerprint"] != manifest.origin.fingerprint:
        changed.append("the data set holds other images than then")
    if changed:
        raise UserError(
            f"run {name} was started with other settings: {'; '.join(changed)}; "
            "submit it with the same ones to go on, or choose another --name"
        )


def _fit(config: TrainConfig, dataset: str, store: str, name: str, resources: Resources, run: TrackedRun) -> None:
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": config.to_json(),
            "dataset": dataset,
            "folder": storage.join(store, name),
            "label": name,
            "run": asdict(run),
            "threads": resources.threads_per_worker,
            "memory_limit": None if resources.shard_memory_mib is None else resources.shard_memory_mib * 2**20,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=store,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            # Every checkpoint holds the best model beside the last one: the newest is all that is needed.
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[_StopAtUserError()],  # type: ignore[list-item]
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, UserError):
            raise error.controller_failure from error
        raise
    except TrainingFailedError as error:
        if cause := _user_error(error):
            raise cause from error
        raise


class _StopAtUserError(UserCallback):
    """Ends a training whose workers failed for a reason that starting them again would not mend."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        for error in worker_exceptions.values():
            if cause := _user_error(error):
                raise cause


def _user_error(error: BaseException | None) -> UserError | None:
    """Returns the `UserError` that an exception from a worker is, wraps or was raised from."""
    while error is not None:
        if isinstance(error, UserError):
            return UserError(*error.args)
        inner = getattr(error, "cause", None) or error.__cause__
        for failure in getattr(error, "worker_failures", {}).values():
            inner = inner or _user_error(failure)
        error = inner
    return None


def _work(spec: dict[str, Any]) -> None:
    """What every worker does: trains, reports, and at the end makes the finished model."""
    torch.set_num_threads(spec["threads"])
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device())
    chief = worker.rank == 0
    run = TrackedRun(**spec["run"])
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
        print(
            f"{spec['label']}: {worker.world_size} workers, images in {training.images.placement}{resumed}", flush=True
        )
    with _system_metrics(run, context.get_node_rank(), context.get_local_rank() == 0):
        unlogged: list[tuple[int, dict[str, float]]] = []
        for report in _with_progress(training, spec["label"], chief):
            unlogged.append((report.epoch, report.metrics))
            if not report.validated:
                continue
            if chief:
                run.log_metrics(unlogged)
                if report.pictures_due:
                    _log_pictures(training, run)
            unlogged.clear()
            _report(training, report, chief)
        bound = training.finish()
    if chief:
        metrics = bound_metrics("valid", bound, training.config.model)
        _write_outcome(training, metrics, spec["folder"])


def _with_progress(training: Training, label: str, chief: bool) -> Iterator[EpochReport]:
    if not chief:
        yield from training.epochs()
        return
    total = training.config.epochs
    with Progress(f"train {label}", total, "epochs", done=training.epoch, interval=5) as progress:
        note = ""
        for report in training.epochs():
            if report.validated:
                note = f"valid lower bound {report.metrics['valid/lower_bound']:.2f} nats at epoch {report.epoch}"
            progress.advance(note=note)
            yield report


def _report(training: Training, report: EpochReport, chief: bool) -> None:
    metrics = {"epoch": report.epoch, **report.metrics}
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


def _log_pictures(training: Training, run: TrackedRun) -> None:
    """Logs sampling chains (Figure 1) and infusion chains (Figure 2) of the current model."""
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
def _system_metrics(run: TrackedRun, node: int, wanted: bool) -> Iterator[None]:
    """Logs the load of this node's processors, memory, network and GPUs while the block runs."""
    if not wanted:
        yield
        return
    monitor = SystemMetricsMonitor(
        run.run_id, SYSTEM_METRICS_INTERVAL_SECONDS, resume_logging=True, node_id=f"node-{node}"
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _write_outcome(training: Training, metrics: Mapping[str, float], folder: str) -> None:
    """Writes the finished model and what there is to say of it into the run's folder."""
    with tempfile.TemporaryDirectory() as temporary:
        save_model(training.model, Path(temporary))
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            storage.write_bytes(storage.join(folder, _MODEL_FOLDER, file), (Path(temporary) / file).read_bytes())
    outcome = {"best_epoch": training.best_epoch, "metrics": metrics, "history": training.history}
    storage.write_bytes(storage.join(folder, _OUTCOME_FILE), _json(outcome))


def _read_model(folder: str) -> InfusionModel:
    with tempfile.TemporaryDirectory() as temporary:
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            (Path(temporary) / file).write_bytes(storage.read_bytes(storage.join(folder, _MODEL_FOLDER, file)))
        return load_model(Path(temporary))


def _register(config: TrainConfig, manifest: Manifest, folder: str, name: str, run: TrackedRun) -> TrainResult:
    outcome = _read_json(storage.join(folder, _OUTCOME_FILE))
    assert outcome is not None, "the workers write the outcome before they end"
    bound, bits = (outcome["metrics"][f"valid/{metric}"] for metric in ("lower_bound", "bits_per_dimension"))
    run.log_file("curves.png", png(training_curves(outcome["history"])))
    run.log_metrics([(outcome["best_epoch"], {f"final/{key}": value for key, value in outcome["metrics"].items()})])
    model = registry.register(
        _read_model(folder),
        registry.model_name(manifest.name),
        run,
        {
            "valid/lower_bound": str(bound),
            "variance_floor": str(config.model.variance_floor),
            "dataset_fingerprint": manifest.origin.fingerprint,
            "run": name,
        },
    )
    rates = sorted(epoch["throughput/train_images_per_second"] for epoch in outcome["history"])
    return TrainResult(
        run=name,
        model=model.uri,
        challenger=f"models:/{model.name}@{registry.CHALLENGER}",
        mlflow_run=run.uri,
        folder=folder,
        best_epoch=outcome["best_epoch"],
        valid_lower_bound=bound,
        valid_bits_per_dimension=bits,
        variance_floor=config.model.variance_floor,
        train_images_per_second=rates[len(rates) // 2],
    )


def _read_json(uri: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    return content


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

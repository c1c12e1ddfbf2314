"""Training on a Ray cluster: workers, checkpoints on S3, the MLflow run, and the registered model.

A run has a name and a folder, `STORAGE/NAME`. In it lie Ray Train's checkpoints, `run.json` (what was asked for, the
MLflow run, and the outcome once there is one) and the finished model. Submitting a name again goes on from its last
checkpoint.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer

from infusion_core.model import CONFIG_FILE, WEIGHTS_FILE, InfusionModel, load_model
from pipeline import cluster, model_package, registry, storage, tracking
from pipeline.curves import figure_png, training_curves
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.ray_failures import StopAtUserError, user_error
from pipeline.tracking import TrackedRun
from pipeline.train_worker import MODEL_FOLDER, OUTCOME_FILE, train_worker
from pipeline.training import TrainConfig, check_fit

_RUN_FILE = "run.json"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        train_images_per_second: median over the epochs.
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
    check_name(name, "run")
    # Workers have another working directory than this process.
    dataset, store = storage.absolute(dataset), storage.absolute(store)
    for uri in (dataset, store):
        storage.check_reachable(uri)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    check_fit(config, dataset, manifest, resources.num_workers)
    folder = storage.join(store, name)
    earlier = read_json(storage.join(folder, _RUN_FILE))
    if earlier is not None:
        _check_same(earlier, config, manifest, name)
        if "result" in earlier:
            return TrainResult(**earlier["result"])
        if earlier["num_workers"] != resources.num_workers:
            sys.stderr.write(
                f"{name} was started with {earlier['num_workers']} workers and goes on with {resources.num_workers}: "
                "each draws its own noise, so that the result will differ from that of an undisturbed run\n"
            )
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
            "num_workers": resources.num_workers,
        }
        run.log_file("config.json", _json({**record, "resources": asdict(resources)}))
        run.log_file("manifest.json", manifest.to_json().encode())
        write_json(storage.join(folder, _RUN_FILE), record)
        run.log_metrics([(0, {"startup/job_seconds": time.time() - psutil.Process().create_time()})])
        _fit(config, dataset, store, name, resources, run)
        result = register(config, manifest, folder, name, run)
        write_json(storage.join(folder, _RUN_FILE), {**record, "result": asdict(result)})
    return result


def check_name(name: str, what: str) -> None:
    """Checks that a folder can be called by a name.

    Raises:
        UserError: it cannot.
    """
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be the name of a {what}; use letters, digits, '.', '_' and '-'")


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
        train_worker,
        train_loop_config={
            "config": config.to_json(),
            "dataset": dataset,
            "folder": storage.join(store, name),
            "label": name,
            "run": asdict(run),
            "threads": resources.threads_per_worker,
            "memory_limit": None if resources.shard_memory_mib is None else resources.shard_memory_mib * 2**20,
            "asked_at": time.time(),
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=store,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            # Every checkpoint holds the best model beside the last one: the newest is all that is needed.
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[StopAtUserError()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if cause := user_error(error):
            raise cause from error
        raise


def _read_model(folder: str) -> InfusionModel:
    with tempfile.TemporaryDirectory() as temporary:
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            (Path(temporary) / file).write_bytes(storage.read_bytes(storage.join(folder, MODEL_FOLDER, file)))
        return load_model(Path(temporary))


def register(
    config: TrainConfig,
    manifest: Manifest,
    folder: str,
    name: str,
    run: TrackedRun,
    lineage: Mapping[str, str] = MappingProxyType({}),
) -> TrainResult:
    """Registers the model that a finished training left in its folder as `challenger`.

    Args:
        config: what was computed.
        manifest: of the data set.
        folder: of the training.
        name: of the training.
        run: its MLflow run.
        lineage: further tags of the registered version.
    """
    outcome = read_json(storage.join(folder, OUTCOME_FILE))
    assert outcome is not None, "the workers write the outcome before they end"
    bound, bits = (outcome["metrics"][f"valid/{metric}"] for metric in ("lower_bound", "bits_per_dimension"))
    run.log_file("curves.png", figure_png(training_curves(outcome["history"])))
    run.log_metrics([(outcome["best_epoch"], {f"final/{key}": value for key, value in outcome["metrics"].items()})])
    model = model_package.register(
        _read_model(folder),
        registry.model_name(manifest.name),
        run,
        {
            "valid/lower_bound": str(bound),
            "variance_floor": str(config.model.variance_floor),
            "dataset_fingerprint": manifest.origin.fingerprint,
            "best_epoch": str(outcome["best_epoch"]),
            "run": name,
            **lineage,
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


def read_json(uri: str) -> dict[str, Any] | None:
    """Returns what a JSON file holds, or `None` if there is none."""
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    return content


def write_json(uri: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    storage.write_bytes(uri, _json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

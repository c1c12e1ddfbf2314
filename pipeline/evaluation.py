"""Evaluation of a registered model on a staged data set.

The lower bound and what a Gaussian scores are always measured; other judges are asked by name. All measurements are
kept as a record (`pipeline.measurements`) with the run that trained the model.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

from infusion_core.noise import GeneratorNoise, derive_seed
from pipeline import model_package, registry, storage, tracking
from pipeline.devices import local_device
from pipeline.errors import UserError
from pipeline.image_judging import Judging
from pipeline.judges import JUDGES, JudgeConfig, Subject, check_asked, gaussian, lower_bound
from pipeline.manifest import Manifest
from pipeline.measurements import EvaluationRecord, Measurement, record_path
from pipeline.progress import Progress
from pipeline.tracking import TrackedRun
from pipeline.training import check_images, estimate_statistics
from pipeline.training_images import open_training_images

STATISTICS_BATCH = 512

T = TypeVar("T")


class _Stream(IntEnum):
    """What a random stream is for; each purpose draws from a stream of its own."""

    STATISTICS_ORDER = 0
    STATISTICS_NOISE = 1
    SPLIT = 2


@dataclass(frozen=True)
class EvaluationResult:
    """How good a model is. Log-likelihoods are in nats per dequantised image.

    Attributes:
        model: the version that was evaluated.
        dataset: the data set.
        split: the split of it.
        images: how many images.
        variance_floor: least variance of the model's transitions.
        lower_bound: mean over the images of one chain's log weight each (Eq. 3).
        lower_bound_standard_error: of that mean.
        bits_per_dimension: the bound in bits per pixel value.
        baseline_variance_floor: least variance of the baseline's pixels, chosen in its favour on the validation split.
        baseline_log_likelihood: mean log-likelihood of a factorial Gaussian fitted to the training split: what is
            reached without learning anything but means and variances.
        baseline_standard_error: of that mean.
        baseline_at_model_floor: the same Gaussian's log-likelihood with the model's variance floor.
        baseline_bits_per_dimension: the baseline in bits.
        measurements: what was measured this time, by judge.
        record: where the measurements are kept: an artifact of the run.
        mlflow_run: where the figures were logged: the run that trained the model.
    """

    model: str
    dataset: str
    split: str
    images: int
    variance_floor: float
    lower_bound: float
    lower_bound_standard_error: float | None
    bits_per_dimension: float
    baseline_variance_floor: float
    baseline_log_likelihood: float
    baseline_standard_error: float | None
    baseline_at_model_floor: float
    baseline_bits_per_dimension: float
    measurements: dict[str, Any]
    record: str
    mlflow_run: str


@dataclass(frozen=True, kw_only=True)
class EvaluationWorkers:
    """Who does the work.

    Attributes:
        num_workers: Ray workers that share out the images; with one, the job's own process does the work.
        threads_per_worker: CPU threads of each of several workers.
        use_gpu: compute on GPUs: each of several workers on one, or the job on its own.
        partial_results: folder on S3 or local in which finished parts are kept, so that a long evaluation that was
            interrupted goes on when it is started again.

    Raises:
        UserError: a value is out of range.
    """

    num_workers: int = 1
    threads_per_worker: int = 1
    use_gpu: bool = False
    partial_results: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_workers", "threads_per_worker"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


def evaluate(
    model_uri: str,
    dataset: str,
    judges: Sequence[str] = (),
    config: JudgeConfig | None = None,
    workers: EvaluationWorkers | None = None,
) -> EvaluationResult:
    """Evaluates a registered model, with batch statistics re-estimated over the training split.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        dataset: address of the staged data set.
        judges: what else to measure than the bound and the Gaussian baseline; names of `JUDGES`.
        config: how thoroughly.
        workers: who does the work.

    Raises:
        UserError: model or data set cannot be had, do not fit each other, or cannot be judged so.
    """
    config, workers = config or JudgeConfig(), workers or EvaluationWorkers()
    check_asked(judges, config)
    dataset = storage.absolute(dataset)  # workers have another working directory
    storage.check_reachable(dataset)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    registered = registry.find(model_uri)
    # Several workers have devices of their own, and need this process's for nothing.
    device = local_device(workers.use_gpu and workers.num_workers == 1)
    model = model_package.load(registered).to(device)
    check_images(model.config, dataset, manifest)
    with Progress("estimate statistics", manifest.rows("train"), "images") as progress:
        # Batches of equal size, in random order: a small last one, or one of a single class, would have odd moments.
        batch_size = manifest.rows("train") // math.ceil(manifest.rows("train") / STATISTICS_BATCH)
        images = open_training_images(dataset, manifest, "train", 0, 1, device)
        batches = _counted(images.batches(batch_size, config.seed, _Stream.STATISTICS_ORDER), len, progress)
        noise = GeneratorNoise.from_seed(config.seed, _Stream.STATISTICS_NOISE, device=device)
        estimate_statistics(model, batches, noise)
    run = TrackedRun.of(registered.run_id)
    path = record_path(manifest.name, config.split)
    new = EvaluationRecord(
        model=registered.uri,
        dataset=dataset,
        dataset_fingerprint=manifest.origin.fingerprint,
        split=config.split,
        measurements=(),
    )
    with Judging(
        model.eval(),
        f"{registered.uri} of run {registered.run_id}, seed {config.seed}, code {tracking.git_commit()}",
        dataset,
        manifest,
        workers.num_workers,
        workers.threads_per_worker,
        workers.use_gpu,
        workers.partial_results,
    ) as judging:
        subject = Subject(judging, config, derive_seed((config.seed, _Stream.SPLIT)))
        for judge in (lower_bound, gaussian, *(JUDGES[name] for name in judges)):
            measured = [replace(m, seed=config.seed, commit=tracking.git_commit()) for m in judge(subject)]
            new = new.with_measurements(measured)
            # Kept one by one, should a later judge fail or be interrupted, and beside what others have kept meanwhile.
            whole = replace(new, measurements=_kept(run, path, new)).with_measurements(new.measurements)
            run.log_file(path, whole.to_json().encode())
    _log(new, registered, run, manifest)
    return _result(new, run, path)


def _kept(run: TrackedRun, path: str, record: EvaluationRecord) -> tuple[Measurement, ...]:
    """Returns the measurements of earlier evaluations on the same data."""
    content = run.read_file(path)
    if content is None:
        return ()
    try:
        earlier = EvaluationRecord.from_json(content, f"{path} of run {run.uri}")
    except UserError as error:
        sys.stderr.write(f"{error}: it is replaced\n")
        return ()
    same = (earlier.model, earlier.dataset_fingerprint) == (record.model, record.dataset_fingerprint)
    return earlier.measurements if same else ()


def _log(record: EvaluationRecord, registered: registry.RegisteredModel, run: TrackedRun, manifest: Manifest) -> None:
    """Logs the measurements as metrics of the run, and the bound as a tag of the version."""
    same_data = manifest.origin.fingerprint == registered.tags.get("dataset_fingerprint")
    # The run's own curves, and what decides on promotion, are of its own data and are left as they are.
    label = "test" if same_data and record.split == "test" else f"evaluation/{manifest.name}/{record.split}"
    figures = {f"{label}/{measurement.judge}": measurement.value for measurement in record.measurements}
    figures[f"{label}/baseline_log_likelihood"] = figures.pop(f"{label}/gaussian")
    bound = record.measurement("lower_bound")
    figures |= {f"{label}/lower_bound_{name}": value for name, value in bound.details["addends"].items()}
    figures[f"{label}/lower_bound_standard_error"] = bound.standard_error or math.nan
    figures[f"{label}/bits_per_dimension"] = bound.details["bits_per_dimension"]
    run.log_metrics([(int(registered.tags.get("best_epoch", "0")), figures)])
    registry.set_tags(registered, {f"{label}/lower_bound": str(bound.value)})


def _result(record: EvaluationRecord, run: TrackedRun, path: str) -> EvaluationResult:
    bound, baseline = record.measurement("lower_bound"), record.measurement("gaussian")
    return EvaluationResult(
        model=record.model,
        dataset=record.dataset,
        split=record.split,
        images=bound.images,
        variance_floor=bound.details["variance_floor"],
        lower_bound=bound.value,
        lower_bound_standard_error=bound.standard_error,
        bits_per_dimension=bound.details["bits_per_dimension"],
        baseline_variance_floor=baseline.details["variance_floor"],
        baseline_log_likelihood=baseline.value,
        baseline_standard_error=baseline.standard_error,
        baseline_at_model_floor=baseline.details["at_model_floor"],
        baseline_bits_per_dimension=baseline.details["bits_per_dimension"],
        measurements={
            measurement.judge: {"name": measurement.name, "value": measurement.value, "of": measurement.images}
            for measurement in record.measurements
        },
        record=f"runs:/{run.run_id}/{path}",
        mlflow_run=run.uri,
    )


def _counted(items: Iterable[T], size: Callable[[T], int], progress: Progress) -> Iterator[T]:
    for item in items:
        yield item
        progress.advance(size(item))

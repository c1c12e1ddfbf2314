"""Evaluation of a registered model on a staged data set: the lower bound, beside what a Gaussian scores."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch

from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise, derive_seed
from infusion_core.pixels import bits_per_dimension
from pipeline import model_package, registry, storage, tracking
from pipeline.bound_evaluation import chunk_share, load_chunks, sum_bound, sum_log_prob
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.tracking import TrackedRun
from pipeline.training import bound_metrics, estimate_statistics, training_gaussian
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
        variance_floor: least variance of the model's transitions, and of the baseline's pixels.
        lower_bound: mean over the images of one chain's log weight each (Eq. 3).
        lower_bound_standard_error: of that mean.
        bits_per_dimension: the bound in bits per pixel value.
        baseline_log_likelihood: mean log-likelihood of a factorial Gaussian fitted to the training split, its variances
            not below the same floor: what is reached without learning anything but means and variances.
        baseline_standard_error: of that mean.
        baseline_bits_per_dimension: the baseline in bits.
        mlflow_run: where the figures were logged: the run that trained the model.
    """

    model: str
    dataset: str
    split: str
    images: int
    variance_floor: float
    lower_bound: float
    lower_bound_standard_error: float
    bits_per_dimension: float
    baseline_log_likelihood: float
    baseline_standard_error: float
    baseline_bits_per_dimension: float
    mlflow_run: str


def evaluate(
    model_uri: str, dataset: str, *, split: str = "test", seed: int = 0, device: torch.device | None = None
) -> EvaluationResult:
    """Evaluates a registered model, with batch statistics re-estimated over the training split.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        dataset: address of the staged data set.
        split: the split to evaluate on.
        seed: of all noise.
        device: where to compute; by default a GPU if this process has one.

    Raises:
        UserError: model or data set cannot be had, or do not fit each other.
    """
    storage.check_reachable(dataset)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    registered = registry.find(model_uri)
    model = model_package.load(registered)
    check_images(model, registered.uri, dataset, manifest)
    device = device or default_device()
    model.to(device)
    with Progress("estimate statistics", manifest.rows("train"), "images") as progress:
        # Batches of equal size, in random order: a small last one, or one of a single class, would have odd moments.
        batch_size = manifest.rows("train") // math.ceil(manifest.rows("train") / STATISTICS_BATCH)
        images = open_training_images(dataset, manifest, "train", 0, 1, device)
        batches = _counted(images.batches(batch_size, seed, _Stream.STATISTICS_ORDER), len, progress)
        noise = GeneratorNoise.from_seed(seed, _Stream.STATISTICS_NOISE, device=device)
        estimate_statistics(model, batches, noise)
    chunks = chunk_share(manifest.rows(split), 0, 1)
    noise_seed = derive_seed((seed, _Stream.SPLIT))
    with Progress(f"evaluate {split}", manifest.rows(split), "images") as progress:
        counted = _counted(load_chunks(dataset, manifest, split, chunks), lambda chunk: len(chunk[1]), progress)
        bound = sum_bound(model, counted, noise_seed)
    config = model.config
    gaussian = training_gaussian(manifest, config.variance_floor)
    baseline = sum_log_prob(gaussian, load_chunks(dataset, manifest, split, chunks), config.levels, noise_seed)
    run = TrackedRun.of(registered.run_id)
    run.log_metrics([(0, {**bound_metrics(split, bound, config), f"{split}/baseline_log_likelihood": baseline.mean})])
    registry.set_tags(registered, {f"{split}/lower_bound": str(bound.mean)})
    return EvaluationResult(
        model=registered.uri,
        dataset=dataset,
        split=split,
        images=bound.count,
        variance_floor=config.variance_floor,
        lower_bound=bound.mean,
        lower_bound_standard_error=bound.standard_error,
        bits_per_dimension=bits_per_dimension(bound.mean, config.dimensions, config.levels),
        baseline_log_likelihood=baseline.mean,
        baseline_standard_error=baseline.standard_error,
        baseline_bits_per_dimension=bits_per_dimension(baseline.mean, config.dimensions, config.levels),
        mlflow_run=run.uri,
    )


def _counted(items: Iterable[T], size: Callable[[T], int], progress: Progress) -> Iterator[T]:
    for item in items:
        yield item
        progress.advance(size(item))


def check_images(model: InfusionModel, name: str, dataset: str, manifest: Manifest) -> None:
    """Checks that a model is of images as those of a data set.

    Raises:
        UserError: shape or grey levels differ.
    """
    if model.config.image_shape != manifest.image_shape:
        raise UserError(
            f"{name} is a model of images of shape {model.config.image_shape} (height, width, channels), but those of "
            f"{dataset} have shape {manifest.image_shape}; choose another model or data set"
        )
    if model.config.levels != manifest.levels:
        raise UserError(
            f"{name} is a model of {model.config.levels} grey levels, but {dataset} has {manifest.levels}; "
            "choose another model or data set"
        )


def default_device() -> torch.device:
    """Returns the GPU that this process was given, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Evaluation of a registered model on a staged data set: the lower bound, beside what a Gaussian scores."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch

from infusion_core.noise import GeneratorNoise, derive_seed
from infusion_core.pixels import bits_per_dimension
from pipeline import model_package, registry, storage, tracking
from pipeline.bound_evaluation import chunk_share, load_chunks, sum_bound, sum_log_prob
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.tracking import TrackedRun
from pipeline.training import bound_metrics, check_images, estimate_statistics, training_gaussian
from pipeline.training_images import open_training_images

STATISTICS_BATCH = 512
BASELINE_FLOORS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

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
    baseline_variance_floor: float
    baseline_log_likelihood: float
    baseline_standard_error: float
    baseline_at_model_floor: float
    baseline_bits_per_dimension: float
    mlflow_run: str


def evaluate(
    model_uri: str, dataset: str, *, split: str = "test", seed: int = 0, use_gpu: bool = False
) -> EvaluationResult:
    """Evaluates a registered model, with batch statistics re-estimated over the training split.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        dataset: address of the staged data set.
        split: the split to evaluate on.
        seed: of all noise.
        use_gpu: compute on this process's GPU.

    Raises:
        UserError: model or data set cannot be had, or do not fit each other.
    """
    storage.check_reachable(dataset)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    registered = registry.find(model_uri)
    device = torch.device("cuda" if use_gpu else "cpu")
    model = model_package.load(registered).to(device)
    config = model.config
    check_images(config, dataset, manifest)
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
    floor = baseline_floor(dataset, manifest, noise_seed)
    baseline, at_model_floor = (
        sum_log_prob(
            training_gaussian(manifest, least), load_chunks(dataset, manifest, split, chunks), config.levels, noise_seed
        )
        for least in (floor, config.variance_floor)
    )
    same_data = manifest.origin.fingerprint == registered.tags.get("dataset_fingerprint")
    # The run's own curves, and what decides on promotion, are of its own data and are left as they are.
    label = "test" if same_data and split == "test" else f"evaluation/{manifest.name}/{split}"
    run = TrackedRun.of(registered.run_id)
    figures = {**bound_metrics(label, bound, config), f"{label}/baseline_log_likelihood": baseline.mean}
    run.log_metrics([(int(registered.tags.get("best_epoch", "0")), figures)])
    registry.set_tags(registered, {f"{label}/lower_bound": str(bound.mean)})
    return EvaluationResult(
        model=registered.uri,
        dataset=dataset,
        split=split,
        images=bound.count,
        variance_floor=config.variance_floor,
        lower_bound=bound.mean,
        lower_bound_standard_error=bound.standard_error,
        bits_per_dimension=bits_per_dimension(bound.mean, config.dimensions, config.levels),
        baseline_variance_floor=floor,
        baseline_log_likelihood=baseline.mean,
        baseline_standard_error=baseline.standard_error,
        baseline_at_model_floor=at_model_floor.mean,
        baseline_bits_per_dimension=bits_per_dimension(baseline.mean, config.dimensions, config.levels),
        mlflow_run=run.uri,
    )


def baseline_floor(dataset: str, manifest: Manifest, seed: int) -> float:
    """Returns the variance floor, of `BASELINE_FLOORS`, at which the training split's Gaussian fits validation best."""
    numbers = chunk_share(manifest.rows("valid"), 0, 1)

    def valid_log_likelihood(floor: float) -> float:
        chunks = load_chunks(dataset, manifest, "valid", numbers)
        return sum_log_prob(training_gaussian(manifest, floor), chunks, manifest.levels, seed).mean

    return max(BASELINE_FLOORS, key=valid_log_likelihood)


def _counted(items: Iterable[T], size: Callable[[T], int], progress: Progress) -> Iterator[T]:
    for item in items:
        yield item
        progress.advance(size(item))

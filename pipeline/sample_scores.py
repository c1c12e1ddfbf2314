"""Scores of samples by their features (Table 3): Inception score, Fréchet and kernel distance, precision and recall.

Samples are judged against the test split, and beside them as many real images from the training split: no model need
do better than those. Both are quantised to the data set's grey levels, the samples by rounding to the cell that a value
lies in, so that no score can tell them apart by what lies between the levels. The estimators are torch-fidelity's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from infusion_core.noise import derive_seed
from infusion_core.pixels import quantise
from pipeline.bound_evaluation import CHUNK_IMAGES, chunk_share, load_chunks
from pipeline.errors import UserError
from pipeline.feature_extractors import FeatureExtractor, ScoreNames
from pipeline.manifest import Manifest
from pipeline.progress import Progress

# Rows of the matrix of distances between features that are in memory at a time.
DISTANCE_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How samples are scored.

    Attributes:
        score_splits: parts of the samples whose scores are averaged.
        kernel_subsets: pairs of random subsets whose kernel distances are averaged.
        kernel_subset_images: images of such a subset.
        neighbours: of which the last one's distance is the radius that precision and recall allow an image.
        seed: of all choices at random.

    Raises:
        UserError: a value is out of range.
    """

    score_splits: int = 10
    kernel_subsets: int = 100
    kernel_subset_images: int = 1000
    neighbours: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("score_splits", 1),
            ("kernel_subsets", 1),
            ("kernel_subset_images", 2),
            ("neighbours", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Scores:
    """How good images are by their features, and those of the reference images.

    Attributes:
        images: how many images.
        score: exp of the mean KL divergence from the classes of all to the classes of one (Salimans et al. 2016): mean
            over splits, from 1 to the number of classes.
        score_deviation: standard deviation over the splits.
        frechet_distance: squared Fréchet distance between Gaussians fitted to the features (Heusel et al. 2017). It is
            biased upwards, the more so the fewer images there are.
        kernel_distance: squared maximum mean discrepancy with the kernel (f·f' / F + 1)³ (Bińkowski et al. 2018): mean
            over pairs of subsets; without bias.
        kernel_distance_deviation: standard deviation over the pairs of subsets.
        precision: share of images within the radius of a reference image (Kynkäänniemi et al. 2019).
        recall: share of reference images within the radius of an image.
    """

    images: int
    score: float
    score_deviation: float
    frechet_distance: float
    kernel_distance: float
    kernel_distance_deviation: float
    precision: float
    recall: float


@dataclass(frozen=True)
class SampleScores:
    """The scores of samples, and of real images beside them.

    Attributes:
        names: what the scores are called, for they depend on the features.
        features: which network they are of.
        samples: scores of the samples.
        real: scores of as many images of the training split, or of all if there are fewer.
        reference_images: images of the test split, which both were compared with.
    """

    names: ScoreNames
    features: str
    samples: Scores
    real: Scores
    reference_images: int


Features = tuple[Tensor, Tensor]
"""Features `(N, F)` and logits `(N, K)` of N images."""


def score_samples(
    samples: Iterable[Tensor],
    dataset: str,
    manifest: Manifest,
    extractor: FeatureExtractor,
    config: ScoreConfig | None = None,
) -> SampleScores:
    """Scores samples against the test split of a data set, and images of its training split beside them.

    Memory holds the features of all images, and neither samples nor data sets as a whole.

    Args:
        samples: batches of shape `(B, C, H, W)`, pixels in [0, 1]; values outside go to the nearest grey level.
        dataset: address of the staged data set.
        manifest: its manifest.
        extractor: what the images are judged by.
        config: how; the defaults if not given.

    Raises:
        UserError: there are fewer images than an estimator needs, or the samples are not of the data set's kind.
    """
    config = config or ScoreConfig()
    for split in ("test", "train"):
        check_enough(manifest.rows(split), f"images of the {split} split of {dataset}", config)
    generated = _extract(_quantised(samples, dataset, manifest), extractor, "features of samples", None)
    count = len(generated[0])
    check_enough(count, "samples", config)
    tests = (chunk for _, chunk in load_chunks(dataset, manifest, "test", chunk_share(manifest.rows("test"), 0, 1)))
    reference = _extract(tests, extractor, "features of test images", manifest.rows("test"))
    count = min(count, manifest.rows("train"))
    real = _extract(
        _random_images(dataset, manifest, count, config.seed), extractor, "features of training images", count
    )
    return SampleScores(
        names=extractor.names,
        features=extractor.description,
        samples=scores(generated, reference, config),
        real=scores(real, reference, config),
        reference_images=len(reference[0]),
    )


def check_enough(images: int, which: str, config: ScoreConfig) -> None:
    """Checks that there are as many images as the estimators need.

    Raises:
        UserError: there are not; the line names the estimator and its setting.
    """
    for least, use in (
        (config.score_splits, f"one for each of score_splits = {config.score_splits}"),
        (config.kernel_subset_images, f"kernel_subset_images = {config.kernel_subset_images}"),
        (config.neighbours + 1, f"one and its neighbours = {config.neighbours}"),
    ):
        if images < least:
            raise UserError(f"{images:,} {which} are fewer than {least:,}, {use}; provide more, or lower the setting")


def scores(judged: Features, reference: Features, config: ScoreConfig) -> Scores:
    """Scores images by their features, against those of reference images.

    The caller has checked that there are enough (`check_enough`).
    """
    # In float64: small distances are differences of large sums.
    ours, theirs = judged[0].double(), reference[0].double()
    # NumPy's legacy generator, which the library draws from, takes 32 bits.
    seed = derive_seed((config.seed,)) % 2**32
    score = isc_features_to_metric(judged[1], splits=config.score_splits, shuffle=True, rng_seed=seed)
    frechet = fid_statistics_to_metric(fid_features_to_statistics(ours), fid_features_to_statistics(theirs), False)
    kernel = kid_features_to_metric(
        ours,
        theirs,
        kid_subsets=config.kernel_subsets,
        kid_subset_size=config.kernel_subset_images,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    coverage = prc_features_to_metric(
        ours,
        theirs,
        prc_neighborhood=config.neighbours,
        prc_batch_size=DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return Scores(
        images=len(ours),
        score=score[KEY_METRIC_ISC_MEAN],
        score_deviation=score[KEY_METRIC_ISC_STD],
        frechet_distance=frechet[KEY_METRIC_FID],
        kernel_distance=kernel[KEY_METRIC_KID_MEAN],
        kernel_distance_deviation=kernel[KEY_METRIC_KID_STD],
        precision=coverage[KEY_METRIC_PRECISION],
        recall=coverage[KEY_METRIC_RECALL],
    )


def _extract(images: Iterable[Tensor], extractor: FeatureExtractor, label: str, total: int | None) -> Features:
    parts: list[Features] = []
    with Progress(label, total, "images") as progress:
        for batch in images:
            parts.append(extractor(batch))
            progress.advance(len(batch))
    if not parts:
        return torch.empty(0, 1), torch.empty(0, 1)
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(logits)


def _quantised(samples: Iterable[Tensor], dataset: str, manifest: Manifest) -> Iterator[Tensor]:
    height, width, channels = manifest.image_shape
    for batch in samples:
        if batch.shape[1:] != (channels, height, width):
            raise UserError(
                f"{dataset} holds images of shape {(channels, height, width)} (channels, height, width), "
                f"but the samples are of shape {tuple(batch.shape[1:])}; draw them from a model of this data set"
            )
        if not batch.isfinite().all():
            raise UserError("some samples are not finite numbers; draw them from a model whose training went well")
        yield quantise(batch, manifest.levels)


def _random_images(dataset: str, manifest: Manifest, count: int, seed: int) -> Iterator[Tensor]:
    """Yields random images of the training split, in row order: a data set may be sorted by class."""
    total = manifest.rows("train")
    generator = torch.Generator().manual_seed(derive_seed((seed,)))
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    for number, images in load_chunks(dataset, manifest, "train", chunk_share(total, 0, 1)):
        first = number * CHUNK_IMAGES
        rows = chosen[(chosen >= first) & (chosen < first + len(images))] - first
        if len(rows):
            yield images[rows]

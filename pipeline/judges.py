"""The judges of a model: each measures one way how good it is, and says by what number of what.

The first two are always asked; the others by name (`JUDGES`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from types import MappingProxyType

import torch
from torch import Tensor

from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise, derive_seed
from infusion_core.parzen import choose_bandwidth, parzen_estimate
from infusion_core.pixels import bits_per_dimension, dequantise
from infusion_core.sampling import sample_batches
from pipeline.bound_evaluation import BoundSums, chunk_share, load_chunks, sum_log_prob
from pipeline.errors import UserError
from pipeline.image_judges import AnnealingJudge, BoundJudge, ImportanceJudge, ReconstructionErrorJudge
from pipeline.image_judging import Figures, Judging
from pipeline.measurements import NATS, Measurement
from pipeline.progress import Progress
from pipeline.shards import load_rows
from pipeline.training import training_gaussian

BASELINE_FLOORS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BANDWIDTHS = (0.05, 0.07, 0.1, 0.12, 0.14, 0.17, 0.2, 0.25, 0.3, 0.4)
BANDWIDTH_EXAMPLES = 1000
TABLE_2_IMAGES: Mapping[str, int] = MappingProxyType({"test": 1000, "train": 100})


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How thoroughly the judges judge.

    Attributes:
        split: train, valid or test.
        images: how many of the split's first images the judges that are asked by name look at, some of which take long;
            all by default. The lower bound and the Gaussian are always of the whole split.
        seed: of all noise.
        num_chains: numbers of chains k of the importance-sampling estimates, increasing.
        num_temperatures: inverse temperatures of annealed importance sampling; its cost is that of as many chains.
        num_samples: samples of the judges that look at samples.
        bandwidth: of the Parzen window; chosen on the validation split by default.
        features: what samples are scored by: a classifier (models:/infusion-classifier-NAME@ALIAS), inception, or
            inception:PATH of a weights file.
        repetitions: of the whole measurement in Table 2's protocol.

    Raises:
        UserError: a value is out of range.
    """

    split: str = "test"
    images: int | None = None
    seed: int = 0
    num_chains: tuple[int, ...] = (1, 10, 100, 1000)
    num_temperatures: int = 1000
    num_samples: int = 10_000
    bandwidth: float | None = None
    features: str | None = None
    repetitions: int = 10

    def __post_init__(self) -> None:
        if self.split not in ("train", "valid", "test"):
            raise UserError(f"there is no split {self.split!r}; choose train, valid or test")
        for name, least in (("num_temperatures", 1), ("num_samples", 1), ("repetitions", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.images is not None and self.images < 1:
            raise UserError(f"images must be at least 1, not {self.images}")
        if not self.num_chains or self.num_chains[0] < 1 or list(self.num_chains) != sorted(set(self.num_chains)):
            chains = ",".join(map(str, self.num_chains))
            raise UserError(f"num_chains must be numbers of at least 1, each more than the one before, not {chains}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise UserError(f"bandwidth must be positive, not {self.bandwidth}")


@dataclass(frozen=True)
class Subject:
    """The model that is judged, and the images that it is judged by.

    Attributes:
        judging: the model and the data set, and who does the work.
        config: how thoroughly.
        noise_seed: of the noise of images; `config.seed` is that of samples.
    """

    judging: Judging
    config: JudgeConfig
    noise_seed: int

    @property
    def model(self) -> InfusionModel:
        """The model, in evaluation mode."""
        return self.judging.model


def check_asked(judges: Sequence[str], config: JudgeConfig) -> None:
    """Checks what can be checked of the judges that were asked before any of them starts to work.

    Raises:
        UserError: there is no such judge, or it lacks a setting.
    """
    if unknown := [judge for judge in judges if judge not in JUDGES]:
        raise UserError(f"there is no judge {unknown[0]!r}; choose of {', '.join(JUDGES)}")
    if "sample_scores" not in judges:
        return
    if config.features is None:
        raise UserError(
            "sample_scores needs to know by which features: give --features models:/infusion-classifier-NAME@champion "
            "(`python -m jobs.train_classifier` makes one), inception, or inception:PATH"
        )
    if config.split != "test":
        raise UserError(f"sample_scores compares samples with the test split: it cannot be asked of {config.split}")


def lower_bound(subject: Subject) -> list[Measurement]:
    """Measures the lower bound (Eq. 3), and the same with the choice between components averaged out."""
    figures = _judge(_whole(subject), BoundJudge(subject.noise_seed))
    return [
        _bound_measurement(subject, figures, "", "lower_bound", "lower bound"),
        _bound_measurement(
            subject, figures, "averaged_", "component_averaged_bound", "lower bound, components averaged"
        ),
    ]


def _bound_measurement(subject: Subject, figures: Figures, prefix: str, judge: str, name: str) -> Measurement:
    sums = _bound_sums(figures, prefix)
    return _nats(subject, judge, name, sums.mean, sums.standard_error, sums.count, {"addends": sums.addends})


def _bound_sums(figures: Figures, prefix: str = "") -> BoundSums:
    return BoundSums.of(torch.stack([figures[prefix + name] for name in ("prior", "transitions", "reconstruction")]))


def gaussian(subject: Subject) -> list[Measurement]:
    """Measures the diagonal Gaussian of the training split, at the floor that suits it best and at the model's."""
    dataset, manifest, split = subject.judging.dataset, subject.judging.manifest, subject.config.split

    def score(split: str, floor: float) -> BoundSums:
        chunks = load_chunks(dataset, manifest, split, chunk_share(manifest.rows(split), 0, 1))
        return sum_log_prob(training_gaussian(manifest, floor), chunks, manifest.levels, subject.noise_seed)

    best = max(BASELINE_FLOORS, key=lambda floor: score("valid", floor).mean)
    own, at_model_floor = (score(split, floor) for floor in (best, subject.model.config.variance_floor))
    details = {"variance_floor": best, "at_model_floor": at_model_floor.mean}
    return [_nats(subject, "gaussian", "diagonal Gaussian", own.mean, own.standard_error, own.count, details)]


def importance_sampling(subject: Subject) -> list[Measurement]:
    """Measures the importance-sampling estimate (Eq. 2), with its curve over the number of chains."""
    return [_importance(subject, "importance_sampling", "importance sampling", None)]


def _importance(subject: Subject, judge: str, name: str, output_variance: float | None) -> Measurement:
    num_chains = subject.config.num_chains
    figures = _judge(subject, ImportanceJudge(subject.noise_seed, num_chains, output_variance))
    estimates, sizes = figures["estimate"], figures["effective_sample_size"]
    curve = [
        [k, estimate, size]
        for k, estimate, size in zip(num_chains, estimates.mean(0).tolist(), sizes.mean(0).tolist(), strict=True)
    ]
    details = {"num_chains": num_chains[-1], "effective_sample_size": curve[-1][2], "curve": curve}
    if output_variance is not None:
        details["output_variance"] = output_variance
    return _nats(subject, judge, f"{name}, k = {num_chains[-1]:,}", *_mean_and_error(estimates[:, -1]), details)


def annealed_importance_sampling(subject: Subject) -> list[Measurement]:
    """Measures the annealed importance-sampling estimate (Neal 2001)."""
    count = subject.config.num_temperatures
    figures = _judge(subject, AnnealingJudge(subject.noise_seed, count))
    name = f"annealed importance sampling, {count:,} temperatures"
    estimate = _mean_and_error(figures["estimate"][:, 0])
    return [_nats(subject, "annealed_importance_sampling", name, *estimate, {"num_temperatures": count})]


def isotropic(subject: Subject) -> list[Measurement]:
    """Measures bound and importance-sampling estimate with one output variance for all pixels (Table 2).

    The variance is the one at which the lower bound of the validation split is highest: the mean squared error of the
    last transition's means.
    """
    variance = isotropic_variance(subject)
    figures = _judge(_whole(subject), BoundJudge(subject.noise_seed, variance))
    bound = _bound_measurement(subject, figures, "", "isotropic_lower_bound", "lower bound, isotropic output")
    return [
        replace(bound, details={**bound.details, "output_variance": variance}),
        _importance(subject, "isotropic_importance_sampling", "importance sampling, isotropic output", variance),
    ]


def isotropic_variance(subject: Subject) -> float:
    """Returns the output variance at which the validation split's lower bound is highest."""
    error = subject.judging.run("output variance", ReconstructionErrorJudge(subject.noise_seed), "valid")
    return float(error["squared_error"].mean()) / subject.model.config.dimensions


def table_2(subject: Subject) -> list[Measurement]:
    """Measures by Table 2's protocol: the first 1,000 test and 100 training images, repeated with new noise.

    The figure is the importance-sampling estimate with isotropic output on test images, which the paper compares with
    other models; the rest is in the details: mean and standard deviation over the repetitions of every estimate.
    """
    num_chains = subject.config.num_chains[-1:]
    variance = isotropic_variance(subject)
    rows = []
    for split, images in TABLE_2_IMAGES.items():
        estimates: dict[str, list[float]] = {}
        for repetition in range(subject.config.repetitions):
            config = replace(subject.config, split=split, images=images, num_chains=num_chains)
            repeated = replace(subject, config=config, noise_seed=derive_seed((subject.noise_seed, repetition)))
            for label, output_variance in (("", None), ("isotropic_", variance)):
                bound = _judge(repeated, BoundJudge(repeated.noise_seed, output_variance))
                estimates.setdefault(label + "lower_bound", []).append(_bound_sums(bound).mean)
                sampled = _judge(repeated, ImportanceJudge(repeated.noise_seed, num_chains, output_variance))
                estimates.setdefault(label + "importance_sampling", []).append(float(sampled["estimate"].mean()))
        available = min(images, subject.judging.manifest.rows(split))
        rows += [
            {"estimate": label, "split": split, "images": available, "mean": mean(values), "deviation": stdev(values)}
            for label, values in estimates.items()
        ]
        if split == "test":
            figure, judged = estimates["isotropic_importance_sampling"], available
    return [
        Measurement(
            judge="table_2",
            name=f"Table 2's protocol, isotropic output, k = {num_chains[0]:,}",
            value=mean(figure),
            standard_error=stdev(figure) / math.sqrt(subject.config.repetitions),
            unit=NATS,
            images=judged,
            details={
                "variance_floor": subject.model.config.variance_floor,
                "output_variance": variance,
                "num_chains": num_chains[0],
                "repetitions": subject.config.repetitions,
                "rows": rows,
            },
        )
    ]


def parzen(subject: Subject) -> list[Measurement]:
    """Measures the Parzen-window estimate (Table 1) of samples, which are means of the last step as in the paper."""
    samples = list(_samples(subject))
    bandwidth = subject.config.bandwidth
    chosen = bandwidth is None
    if bandwidth is None:
        validation = _dequantised(subject, "valid", BANDWIDTH_EXAMPLES)
        bandwidth = choose_bandwidth(validation, samples, BANDWIDTHS)
    estimate = parzen_estimate(_dequantised(subject, subject.config.split, subject.config.images), samples, bandwidth)
    return [
        Measurement(
            judge="parzen",
            name=f"Parzen window, σ = {bandwidth:g}",
            value=estimate.mean,
            standard_error=estimate.standard_error,
            unit=NATS,
            images=len(estimate.log_densities),
            details={
                "bandwidth": bandwidth,
                "bandwidth_chosen_on": "valid" if chosen else "given",
                "num_samples": sum(map(len, samples)),
            },
        )
    ]


def _dequantised(subject: Subject, split: str, images: int | None) -> Tensor:
    manifest = subject.judging.manifest
    rows = min(images or manifest.rows(split), manifest.rows(split))
    pixels = load_rows(subject.judging.dataset, manifest, split, 0, rows)
    return dequantise(pixels, manifest.levels, GeneratorNoise.from_seed(subject.noise_seed))


def sample_scores(subject: Subject) -> list[Measurement]:
    """Measures scores of samples by their features (Table 3), and those of real images beside them."""
    from pipeline.feature_extractors import INCEPTION_NAMES, open_feature_extractor
    from pipeline.sample_scores import ScoreConfig, score_samples

    dataset, manifest = subject.judging.dataset, subject.judging.manifest
    assert subject.config.features is not None, "check_asked comes first"
    device = subject.model.prior_mean.device
    extractor = open_feature_extractor(subject.config.features, dataset, manifest, device)
    subset = min(ScoreConfig.kernel_subset_images, manifest.rows("test"))
    scoring = ScoreConfig(kernel_subset_images=subset, seed=subject.config.seed)
    result = score_samples(_samples(subject), dataset, manifest, extractor, scoring)
    kind = "inception" if result.names == INCEPTION_NAMES else "classifier"
    return [
        Measurement(
            judge=f"{kind}_{judge}",
            name=getattr(result.names, judge),
            value=getattr(result.samples, judge),
            standard_error=None,
            unit="",
            images=result.samples.images,
            details={
                "features": result.features,
                "real_data": getattr(result.real, judge),
                "reference_images": result.reference_images,
                "deviation": getattr(result.samples, f"{judge}_deviation", None),
            },
        )
        for judge in ("score", "frechet_distance", "kernel_distance", "precision", "recall")
    ]


def _samples(subject: Subject) -> Iterator[Tensor]:
    with Progress("sample", subject.config.num_samples, "samples") as progress:
        for batch in sample_batches(subject.model, subject.config.num_samples, subject.config.seed):
            yield batch.clamp(0, 1).cpu()
            progress.advance(len(batch))


def _judge(subject: Subject, judge: BoundJudge | ImportanceJudge | AnnealingJudge) -> Figures:
    config = subject.config
    title = type(judge).__name__.removesuffix("Judge").lower()
    return subject.judging.run(f"{title}, {config.split}", judge, config.split, config.images)


def _whole(subject: Subject) -> Subject:
    return replace(subject, config=replace(subject.config, images=None))


def _mean_and_error(values: Tensor) -> tuple[float, float | None, int]:
    count = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else None, count


def _nats(
    subject: Subject,
    judge: str,
    name: str,
    value: float,
    standard_error: float | None,
    images: int,
    details: Mapping[str, object],
) -> Measurement:
    """Returns a log-likelihood, with the floor that it was reached with and what it is in bits."""
    config = subject.model.config
    bits = bits_per_dimension(value, config.dimensions, config.levels)
    return Measurement(
        judge=judge,
        name=name,
        value=value,
        standard_error=standard_error,
        unit=NATS,
        images=images,
        details={"variance_floor": config.variance_floor, "bits_per_dimension": bits, **details},
    )


JUDGES: Mapping[str, Callable[[Subject], list[Measurement]]] = MappingProxyType(
    {
        "importance_sampling": importance_sampling,
        "annealed_importance_sampling": annealed_importance_sampling,
        "isotropic": isotropic,
        "table_2": table_2,
        "parzen": parzen,
        "sample_scores": sample_scores,
    }
)

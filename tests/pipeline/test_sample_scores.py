"""Scores of features against closed forms and brute force, and of images against scores of features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from pipeline.errors import UserError
from pipeline.feature_extractors import CLASSIFIER_NAMES
from pipeline.manifest import Manifest
from pipeline.sample_scores import Features, ScoreConfig, Scores, score_samples, scores
from pipeline.shards import load_rows
from pipeline.sources import ArraySource, Rows
from pipeline.staging import stage

Array = npt.NDArray[np.float64]
Digits = tuple[str, Manifest]


def correlated(images: int = 60, *, seed: int = 0, shift: float = 0.0) -> Features:
    """Five features that are correlated, and the logits of four classes."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(5, 5))
    return (
        torch.from_numpy(random.normal(size=(images, 5)) @ mixing + shift),
        torch.from_numpy(random.normal(size=(images, 4)) * 2),
    )


def all_at_once(images: int) -> ScoreConfig:
    """One split and one pair of subsets that hold all images: nothing is left to chance."""
    return ScoreConfig(score_splits=1, kernel_subsets=1, kernel_subset_images=images)


class TestScore:
    def of(self, logits: Array, splits: int = 1) -> Scores:
        features, _ = correlated(len(logits))
        config = ScoreConfig(score_splits=splits, kernel_subsets=1, kernel_subset_images=10)
        return scores((features, torch.from_numpy(logits)), (features, torch.from_numpy(logits)), config)

    def test_it_is_the_mean_divergence_by_brute_force(self) -> None:
        logits = correlated()[1].numpy()
        probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        marginal = probability.mean(0)
        divergences = [sum(p * np.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in probability]
        found = self.of(logits)
        assert found.score == pytest.approx(np.exp(np.mean(divergences)), rel=1e-12)
        assert found.score_deviation == 0

    def test_certain_and_even_predictions_score_the_number_of_classes(self) -> None:
        assert self.of(50 * np.eye(4)[np.arange(60) % 4]).score == pytest.approx(4, rel=1e-6)
        assert self.of(50 * np.eye(4)[np.zeros(60, int)]).score == pytest.approx(1, rel=1e-6)

    def test_splits_are_scored_apart(self) -> None:
        logits = correlated()[1].numpy()
        # What is predicted of one image is what is predicted of its split: no divergence.
        assert self.of(logits, splits=60).score == pytest.approx(1, rel=1e-12)
        # Two splits of two images each: the mean and deviation are those of one of the three ways to pair them.
        logits = np.tile(logits[:4], (15, 1))[:60]
        four = np.exp(logits[:4]) / np.exp(logits[:4]).sum(1, keepdims=True)

        def pair(i: int, j: int) -> float:
            marginal = (four[i] + four[j]) / 2
            return float(np.exp(sum((four[k] * np.log(four[k] / marginal)).sum() for k in (i, j)) / 2))

        ways = [(pair(0, 1), pair(2, 3)), (pair(0, 2), pair(1, 3)), (pair(0, 3), pair(1, 2))]
        features = correlated(4)[0]
        config = ScoreConfig(score_splits=2, kernel_subsets=1, kernel_subset_images=4)
        found = scores((features, torch.from_numpy(logits[:4])), (features, torch.zeros(4, 4)), config)
        assert min(
            abs(found.score - np.mean(way)) + abs(found.score_deviation - np.std(way)) for way in ways
        ) == pytest.approx(0, abs=1e-12)


class TestFrechetDistance:
    def between(self, ours: Array, theirs: Array) -> float:
        parts = [(torch.from_numpy(part), torch.zeros(len(part), 3)) for part in (ours, theirs)]
        return scores(parts[0], parts[1], all_at_once(min(len(ours), len(theirs)))).frechet_distance

    def with_moments(self, mean: Array, covariance: Array, images: int) -> Array:
        """Features whose sample mean and covariance are exactly those given."""
        raw = np.random.default_rng(images).normal(size=(images, len(mean)))
        raw -= raw.mean(0)
        white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
        return white @ np.linalg.cholesky(covariance).T + mean

    def test_of_independent_features_it_is_that_of_means_and_deviations(self) -> None:
        random = np.random.default_rng(0)
        means, deviations = random.normal(size=(2, 6)), random.uniform(0.5, 2, size=(2, 6))
        ours, theirs = (
            self.with_moments(m, np.diag(s**2), n) for m, s, n in zip(means, deviations, (40, 70), strict=True)
        )
        expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
        assert self.between(ours, theirs) == pytest.approx(expected, rel=1e-9)

    def test_of_correlated_features_it_has_the_root_of_the_covariances_product(self) -> None:
        factors = np.random.default_rng(0).normal(size=(2, 6, 6))
        first, second = (factor @ factor.T + 0.1 * np.eye(6) for factor in factors)
        ours, theirs = self.with_moments(np.zeros(6), first, 50), self.with_moments(np.full(6, 0.3), second, 80)
        root = sqrtm(sqrtm(first) @ second @ sqrtm(first)).real
        expected = 6 * 0.09 + np.trace(first + second - 2 * root)
        assert self.between(ours, theirs) == pytest.approx(expected, rel=1e-9)

    def test_a_small_distance_is_not_lost_beside_large_features(self) -> None:
        ours = self.with_moments(np.full(3, 1e3), np.eye(3), 50)
        assert self.between(ours, ours + 1e-3) == pytest.approx(3e-6, abs=1e-8)


class TestKernelDistance:
    def test_it_is_the_discrepancy_by_brute_force(self) -> None:
        ours, theirs = correlated(30)[0], correlated(30, seed=1, shift=0.3)[0]
        labels = torch.zeros(30, 2)
        found = scores((ours, labels), (theirs, labels), all_at_once(30))

        def kernel(a: Tensor, b: Tensor) -> float:
            return (float(a @ b) / 5 + 1) ** 3

        n = 30
        within = sum(
            kernel(part[i], part[j]) for part in (ours, theirs) for i in range(n) for j in range(n) if i != j
        ) / (n * (n - 1))
        between = sum(kernel(a, b) for a in ours for b in theirs) / n**2
        assert found.kernel_distance == pytest.approx(within - 2 * between, rel=1e-10)
        assert found.kernel_distance_deviation == 0

    def test_subsets_of_the_size_asked_for_agree_with_all_on_average(self) -> None:
        ours, theirs = correlated(40), correlated(40, seed=1, shift=0.5)
        whole = scores(ours, theirs, all_at_once(40))
        config = ScoreConfig(score_splits=1, kernel_subsets=400, kernel_subset_images=10)
        found = scores(ours, theirs, config)
        error = found.kernel_distance_deviation / 400**0.5
        assert found.kernel_distance_deviation > 0
        assert found.kernel_distance == pytest.approx(whole.kernel_distance, abs=4 * error)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_by_brute_force(neighbours: int) -> None:
    ours, theirs = correlated(50)[0], correlated(70, seed=1, shift=1.5)[0]
    config = ScoreConfig(score_splits=1, kernel_subsets=1, kernel_subset_images=2, neighbours=neighbours)
    found = scores((ours, torch.zeros(50, 2)), (theirs, torch.zeros(70, 2)), config)

    def covered(points: Array, others: Array) -> float:
        radii = [np.sort(np.linalg.norm(others - other, axis=1))[neighbours] for other in others]
        return float(np.mean([(np.linalg.norm(others - point, axis=1) <= radii).any() for point in points]))

    # The library counts in float32.
    assert found.precision == pytest.approx(covered(ours.numpy(), theirs.numpy()), rel=1e-6)
    assert found.recall == pytest.approx(covered(theirs.numpy(), ours.numpy()), rel=1e-6)
    assert found.precision != found.recall
    assert {found.precision, found.recall}.isdisjoint({0, 1})


class Pixels:
    """Features that are the pixels, with a class for every quadrant of the images."""

    names = CLASSIFIER_NAMES
    description = "pixels"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        return images.flatten(1).float(), torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1)


CONFIG = ScoreConfig(score_splits=2, kernel_subsets=5, kernel_subset_images=100)


def batches(dataset: str, manifest: Manifest, split: str, rows: int, shift: float = 0.5) -> Iterator[Tensor]:
    images = load_rows(dataset, manifest, split, 0, rows)
    yield from ((images.double() + shift) / manifest.levels).split(60)


class TestScoreSamples:
    def test_samples_are_judged_against_the_test_split_beside_training_images(self, digits: Digits) -> None:
        found = score_samples(batches(*digits, "valid", 250), *digits, Pixels(), CONFIG)
        judged, reference = (Pixels()(load_rows(*digits, split, 0, 250)) for split in ("valid", "test"))
        assert found.samples == scores(judged, reference, CONFIG)
        assert found.real.images == found.samples.images == found.reference_images == 250
        assert found.features == "pixels"
        assert found.names == CLASSIFIER_NAMES

    def test_the_test_images_themselves_cannot_be_told_from_the_test_images(self, digits: Digits) -> None:
        found = score_samples(batches(*digits, "test", 250), *digits, Pixels(), CONFIG).samples
        assert found.frechet_distance == pytest.approx(0, abs=1e-4)
        assert found.precision == found.recall == 1

    def test_more_samples_than_training_images_are_scored_beside_all_of_these(self, digits: Digits) -> None:
        twice = [batch for _ in range(2) for batch in batches(*digits, "train", 1297)]
        found = score_samples(twice, *digits, Pixels(), CONFIG)
        assert (found.samples.images, found.real.images) == (2594, 1297)
        train, test = (Pixels()(load_rows(*digits, split, 0, rows)) for split, rows in (("train", 1297), ("test", 250)))
        assert found.real == scores(train, test, CONFIG)

    def test_only_grey_levels_count(self, digits: Digits) -> None:
        plain = score_samples(batches(*digits, "valid", 250), *digits, Pixels(), CONFIG)
        for shift in (0.01, 0.99):
            assert score_samples(batches(*digits, "valid", 250, shift), *digits, Pixels(), CONFIG) == plain
        beyond = [
            torch.where(batch > 16 / 17, 3.0, torch.where(batch < 1 / 17, -2.0, batch))
            for batch in batches(*digits, "valid", 250)
        ]
        assert score_samples(beyond, *digits, Pixels(), CONFIG) == plain

    def test_training_images_are_taken_from_all_over_the_split(self, tmp_path: Path) -> None:
        # An image tells its row.
        rows = np.stack([np.arange(1000) // 250, np.arange(1000) % 250], 1).astype(np.uint8).reshape(1000, 1, 2, 1)
        part = {"train": Rows(rows, np.full(1000, -1))}
        part["valid"] = part["test"] = Rows(rows[:20], np.full(20, -1))
        stage(ArraySource("rows", part), str(tmp_path / "rows"))
        data = str(tmp_path / "rows"), Manifest.load(str(tmp_path / "rows"))
        seen: list[Tensor] = []

        class Seen(Pixels):
            def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
                seen.append(images)
                return images.flatten(1).float(), images.flatten(1).float()

        config = ScoreConfig(score_splits=1, kernel_subsets=1, kernel_subset_images=10)
        samples = [torch.rand(100, 1, 1, 2)]
        taken = []
        for seed in (0, 0, 1):
            seen.clear()
            score_samples(samples, *data, Seen(), ScoreConfig(**{**vars(config), "seed": seed}))
            images = torch.cat(seen[2:]).flatten(1).long()
            taken.append((images[:, 0] * 250 + images[:, 1]).tolist())
        assert len(set(taken[0])) == 100
        assert taken[0] == taken[1] != taken[2]
        quarters = np.bincount(np.array(taken[0]) // 250, minlength=4)
        assert quarters.min() > 10

    @pytest.mark.parametrize(
        ("change", "samples", "message"),
        [
            ({"kernel_subset_images": 251}, 250, r"250 images of the test split .* 251, kernel_subset_images = 251"),
            ({"score_splits": 200}, 199, r"199 samples are fewer than 200, .*score_splits = 200"),
            ({"kernel_subset_images": 201}, 200, r"200 samples are fewer than 201, kernel_subset_images = 201"),
            ({"neighbours": 200}, 200, r"200 samples are fewer than 201, .*neighbours = 200"),
            ({}, 0, r"0 samples are fewer than"),
        ],
    )
    def test_fewer_images_than_an_estimator_needs(
        self, digits: Digits, change: dict[str, int], samples: int, message: str
    ) -> None:
        config = ScoreConfig(**{**vars(CONFIG), **change})
        given = batches(*digits, "train", samples) if samples else []
        with pytest.raises(UserError, match=message):
            score_samples(given, *digits, Pixels(), config)

    def test_samples_of_another_kind(self, digits: Digits) -> None:
        with pytest.raises(UserError, match=r"of shape \(1, 8, 8\) .*samples are of shape \(3, 8, 8\)"):
            score_samples([torch.zeros(200, 3, 8, 8)], *digits, Pixels(), CONFIG)
        broken = torch.zeros(200, 1, 8, 8)
        broken[7, 0, 3, 3] = torch.nan
        with pytest.raises(UserError, match="not finite numbers"):
            score_samples([broken], *digits, Pixels(), CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"score_splits": 0}, {"kernel_subsets": 0}, {"kernel_subset_images": 1}, {"neighbours": 0}, {"seed": -1}],
)
def test_settings_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(change))} must be at least"):
        ScoreConfig(**change)

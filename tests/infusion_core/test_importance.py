import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from infusion_core.bound import log_weight
from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.importance import LogWeightSums, importance_sampling
from infusion_core.noise import GeneratorNoise
from infusion_core.schedule import InfusionSchedule

SCHEDULE = InfusionSchedule(num_steps=3, initial_rate=0.1, rate_increment=0.1, target_variance=0.05)
TARGET = torch.tensor([[0.3, -0.4], [1.2, 0.1], [-0.6, 0.9]], dtype=torch.float64)


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class LinearModel:
    """A chain of linear transitions in two dimensions, whose marginal density is a known Gaussian."""

    matrix = np.array([[0.7, -0.4], [0.3, 0.8]])
    shift = np.array([0.1, -0.2])
    variance = np.array([0.2, 0.4])

    def __init__(self) -> None:
        self.prior = FactorialGaussian(tensor(0.2, -0.1), tensor(0.6, 1.1))
        self.rows: list[int] = []

    def operator(self, state: torch.Tensor, step: int) -> FactorialGaussian:
        mean = state @ torch.from_numpy(self.matrix).T + torch.from_numpy(self.shift)
        return FactorialGaussian(mean, torch.from_numpy(self.variance).expand_as(mean))

    def log_weights(self, target, noise) -> torch.Tensor:
        self.rows.append(len(target))
        return log_weight(self.prior, self.operator, SCHEDULE, target, noise).total

    def log_marginal(self, x: np.ndarray) -> float:
        mean, covariance = self.prior.mean.numpy(), np.diag(self.prior.variance.numpy())
        for _ in range(SCHEDULE.num_steps):
            mean = self.matrix @ mean + self.shift
            covariance = self.matrix @ covariance @ self.matrix.T + np.diag(self.variance)
        deviation = x - mean
        _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
        return -0.5 * float(deviation @ np.linalg.solve(covariance, deviation) + log_det)


# Sums


def random_log_weights(chains: int, examples: int = 4) -> torch.Tensor:
    """Log weights of very different sizes, example by example, such that no exponential of theirs can be formed."""
    generator = torch.Generator().manual_seed(chains)
    scale, centre = tensor(0.1, 3, 40, 1), tensor(0, -1500, 2000, -1e5)
    return centre[:examples] + scale[:examples] * torch.randn(chains, examples, generator=generator).double()


def brute_force(log_weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate, effective sample size and mean by extended-precision numpy, each weight formed."""
    values = log_weights.numpy().astype(np.longdouble)
    largest = values.max(0)
    weights = np.exp(values - largest)
    estimate = np.log(weights.mean(0)) + largest
    return estimate, weights.sum(0) ** 2 / (weights**2).sum(0), values.mean(0)


@pytest.mark.parametrize("sizes", [[1], [60], [1, 1, 1, 57], [20, 0, 40], [59, 1]])
def test_sums_give_what_all_weights_at_once_do(sizes):
    log_weights = random_log_weights(sum(sizes))
    sums = LogWeightSums.empty(4)
    for part in log_weights.split(sizes):
        sums = sums.update(part)
    estimate, size, mean = brute_force(log_weights)
    np.testing.assert_allclose(sums.estimate, estimate.astype(float), rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(sums.effective_sample_size, size.astype(float), rtol=1e-8)
    np.testing.assert_allclose(sums.lower_bound, mean.astype(float), rtol=1e-14, atol=1e-13)
    assert sums.num_chains.tolist() == [sum(sizes)] * 4


def test_merged_sums_are_those_of_all_chains_in_any_grouping():
    log_weights = random_log_weights(30)
    first, second, third = (LogWeightSums.empty(4).update(part) for part in log_weights.split([3, 20, 7]))
    whole = LogWeightSums.empty(4).update(log_weights)
    for merged in (first.merge(second).merge(third), third.merge(second.merge(first))):
        torch.testing.assert_close(merged.values, whole.values, rtol=1e-14, atol=1e-12)


def test_single_precision_log_weights_are_summed_in_double():
    log_weights = torch.full((1000, 2), -0.1, dtype=torch.float32)
    sums = LogWeightSums.empty(2).update(log_weights)
    torch.testing.assert_close(sums.estimate, log_weights[0].double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(sums.lower_bound, log_weights[0].double(), rtol=1e-14, atol=0)


def test_effective_sample_size_counts_the_weights_that_matter():
    # 50 equal weights; the same with all but one vanishing; w = 1 and 3: 16 / 10.
    equal = torch.full((50, 1), -700.0)
    single = torch.cat([equal, tensor(0.0)[:, None]])
    pair = tensor(-900, -900 + math.log(3))[:, None]
    sizes = [
        LogWeightSums.empty(1).update(part).effective_sample_size.item() for part in (equal.double(), single, pair)
    ]
    assert sizes == pytest.approx([50, 1, 1.6], rel=1e-9)


def test_no_chains_have_no_estimate():
    sums = LogWeightSums.empty(2)
    for figure in (sums.estimate, sums.effective_sample_size, sums.lower_bound):
        assert figure.isnan().all()


def test_a_single_chain_s_estimate_is_its_log_weight():
    sums = LogWeightSums.empty(2).update(tensor([-3.0, 5.0]))
    assert sums.estimate.tolist() == sums.lower_bound.tolist() == [-3, 5]
    assert sums.effective_sample_size.tolist() == [1, 1]


@pytest.mark.parametrize("values", [torch.zeros(4, 3), torch.zeros(3, 4).double(), torch.zeros(4).double()])
def test_other_tensors_than_sums_are_refused(values):
    with pytest.raises(InfusionError, match="float64 tensor of 4 rows"):
        LogWeightSums(values)


# Sampling


def test_estimate_approaches_the_closed_form_and_the_bound_lies_below():
    # With 4,000 chains, within 5 standard errors by the delta method: the relative variance of Σ w is 1/ESS - 1/k.
    model = LinearModel()
    (sums,) = importance_sampling(model.log_weights, TARGET, (0,), [4000], rows_at_once=12_000)
    truth = tensor(*(model.log_marginal(x) for x in TARGET.numpy()))
    error = (1 / sums.effective_sample_size - 1 / sums.num_chains).sqrt()
    assert error.max() < 0.06
    assert ((sums.estimate - truth).abs() < 5 * error).all()
    assert (sums.lower_bound < truth - 0.3).all()


def test_estimate_rises_with_the_number_of_chains():
    # Over 2,000 repetitions, each rise beyond 3 standard errors of the difference of paired estimates.
    model = LinearModel()
    target = TARGET[:1].expand(2000, 2)
    curve = list(importance_sampling(model.log_weights, target, (1,), [1, 4, 16], rows_at_once=16_000))
    truth = model.log_marginal(TARGET[0].numpy())
    for fewer, more in itertools.pairwise(curve):
        rise = more.estimate - fewer.estimate
        assert rise.mean() > 3 * rise.std() / math.sqrt(2000)
    assert curve[-1].estimate.mean() < truth


@pytest.mark.parametrize("rows_at_once", [3, 8, 1000])
def test_chains_have_noise_of_their_own_however_many_run_at_once(rows_at_once):
    # Against every chain run alone.
    model = LinearModel()
    known = torch.stack([model.log_weights(TARGET, GeneratorNoise.from_seed(7, 2, chain)) for chain in range(11)])
    assert len(known.unique()) == known.numel()
    model.rows.clear()
    curve = list(importance_sampling(model.log_weights, TARGET, (7, 2), [1, 4, 11], rows_at_once=rows_at_once))
    assert max(model.rows) <= rows_at_once
    assert sum(model.rows) == 11 * len(TARGET)
    for k, sums in zip([1, 4, 11], curve, strict=True):
        assert sums.num_chains.tolist() == [k] * 3
        torch.testing.assert_close(sums.values, LogWeightSums.empty(3).update(known[:k]).values, rtol=1e-12, atol=1e-12)


def test_a_batch_is_run_together_as_often_as_it_fits():
    model = LinearModel()
    list(importance_sampling(model.log_weights, TARGET, (0,), [2, 10], rows_at_once=11))
    assert model.rows == [6, 9, 9, 6]


def test_images_of_any_shape_are_repeated_whole():
    # The log weight is told by the row's own values: every chain of an example sees that example.
    target = torch.arange(24, dtype=torch.float32).view(2, 3, 2, 2)
    (sums,) = importance_sampling(lambda rows, _: rows.flatten(1).sum(1), target, (0,), [5], rows_at_once=6)
    assert sums.lower_bound.tolist() == target.flatten(1).sum(1).tolist()


def test_no_graph_is_kept():
    layer = nn.Linear(2, 1)
    (sums,) = importance_sampling(lambda rows, _: layer(rows.float())[:, 0], TARGET, (0,), [3])
    assert not sums.values.requires_grad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_chains": [0, 10]}, r"at least one chain, not k = \[0, 10\]"),
        ({"num_chains": []}, r"at least one chain, not k = \[\]"),
        ({"num_chains": [1, 10, 10]}, r"must increase, which k = \[1, 10, 10\] do not"),
        ({"rows_at_once": 2}, "batch of 3 examples is not from 1 to rows_at_once = 2"),
        ({"target": TARGET[:0]}, "batch of 0 examples"),
    ],
)
def test_arguments_out_of_range_are_refused_before_sampling(changed, message):
    arguments = {"target": TARGET, "entropy": (0,), "num_chains": [1]} | changed
    with pytest.raises(InfusionError, match=message):
        importance_sampling(LinearModel().log_weights, **arguments)

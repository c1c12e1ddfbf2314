import itertools
import math

import numpy as np
import pytest
import torch
from torch import distributions

from infusion_core.annealing import annealed_log_weight, inverse_temperatures
from infusion_core.bound import log_weight
from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.importance import importance_sampling
from infusion_core.noise import GeneratorNoise
from infusion_core.schedule import InfusionSchedule


class LinearOperator:
    """z⁽ᵗ⁾ = A⁽ᵗ⁾ z + b⁽ᵗ⁾ + noise of variance v⁽ᵗ⁾, different at every step: the marginal is a known Gaussian."""

    def __init__(self, dimensions: int, num_steps: int) -> None:
        random = np.random.default_rng(dimensions)
        square = (dimensions, dimensions)
        self.matrices = [0.8 * np.linalg.qr(random.normal(size=square))[0] for _ in range(num_steps)]
        self.shifts = random.normal(size=(num_steps, dimensions)) * 0.2
        self.variances = random.uniform(0.05, 0.2, size=(num_steps, dimensions))
        self.prior_mean = random.normal(size=dimensions) * 0.3
        self.prior_variance = random.uniform(0.3, 1, size=dimensions)
        self.rows = 0

    def __call__(self, state, step):
        self.rows += len(state)
        matrix, shift, variance = (
            torch.from_numpy(array[step - 1]) for array in (self.matrices, self.shifts, self.variances)
        )
        mean = state.flatten(1) @ matrix.T + shift
        return FactorialGaussian(mean.view_as(state), variance.expand_as(mean).view_as(state))

    def prior(self, *event: int) -> FactorialGaussian:
        return FactorialGaussian(
            torch.from_numpy(self.prior_mean).view(event), torch.from_numpy(self.prior_variance).view(event)
        )

    def moments(self, output_variance: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        mean, covariance = self.prior_mean, np.diag(self.prior_variance)
        for step, (matrix, shift, variance) in enumerate(
            zip(self.matrices, self.shifts, self.variances, strict=True), start=1
        ):
            if step == len(self.matrices) and output_variance is not None:
                variance = np.full_like(variance, output_variance)
            mean, covariance = matrix @ mean + shift, matrix @ covariance @ matrix.T + np.diag(variance)
        return mean, covariance

    def log_marginal(self, x: np.ndarray, output_variance: float | None = None) -> float:
        mean, covariance = self.moments(output_variance)
        deviation = x - mean
        _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
        return -0.5 * float(deviation @ np.linalg.solve(covariance, deviation) + log_det)


def standard_error(values: torch.Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("rates", "mask", "output_variance"),
    [
        ((0.0, 0.0), "value", None),
        ((0.3, 0.1), "value", None),
        ((0.3, 0.1), "pixel", None),
        ((0.0, 0.4), "value", 0.4),
    ],
)
def test_mean_weight_is_the_marginal_density_of_a_linear_gaussian_model(rates, mask, output_variance):
    # Two dimensions, as two channels of one pixel. Within 5 standard errors, which are below 3 % of the density.
    n = 4000
    operator = LinearOperator(2, 3)
    schedule = InfusionSchedule(
        num_steps=3, initial_rate=rates[0], rate_increment=rates[1], target_variance=0.1, mask=mask
    )
    x = np.array([1.1, -0.7])
    target = torch.from_numpy(x).view(1, 2, 1).expand(n, 2, 1)
    annealed = annealed_log_weight(
        operator.prior(2, 1),
        operator,
        schedule,
        target,
        GeneratorNoise.from_seed(1),
        inverse_temperatures(120),
        output_variance=output_variance,
    )
    relative = (annealed.total - operator.log_marginal(x, output_variance)).exp()
    assert standard_error(relative) < 0.03
    assert abs(relative.mean().item() - 1) < 5 * standard_error(relative)
    assert ((annealed.acceptance_rate > 0) & (annealed.acceptance_rate < 1)).any()


def test_weights_vary_the_less_the_more_temperatures_there_are():
    # Sixteen times as many more than halve the deviation; the mean of the log weights rises towards the truth.
    n = 1000
    operator = LinearOperator(2, 3)
    schedule = InfusionSchedule(num_steps=3, initial_rate=0.2, target_variance=0.1)
    x = np.array([1.1, -0.7])
    target = torch.from_numpy(x).expand(n, 2)
    truth = operator.log_marginal(x)
    totals = [
        annealed_log_weight(
            operator.prior(2),
            operator,
            schedule,
            target,
            GeneratorNoise.from_seed(count),
            inverse_temperatures(count),
        ).total
        for count in (1, 16, 256)
    ]
    for fewer, more in itertools.pairwise(totals):
        assert more.var() < fewer.var() / 4
        assert fewer.mean() + 5 * standard_error(fewer) < more.mean()
    assert totals[-1].mean().item() < truth < totals[-1].mean().item() + 0.3


@pytest.mark.parametrize("temperatures", [inverse_temperatures(600), [j / 600 for j in range(1, 601)]])
def test_estimate_is_tighter_than_importance_sampling_s_at_equal_cost(temperatures):
    # 32 dimensions: what 600 chains give, one annealed or all as they are; both stay below the truth, as estimates do.
    dimensions, num_steps, cost, repetitions = 32, 4, len(temperatures), 20
    operator = LinearOperator(dimensions, num_steps)
    schedule = InfusionSchedule(num_steps=num_steps, initial_rate=0.1, rate_increment=0.05, target_variance=0.05)
    mean, covariance = operator.moments()
    x = np.random.default_rng(5).multivariate_normal(mean, covariance)
    truth = operator.log_marginal(x)
    target = torch.from_numpy(x).expand(repetitions, dimensions)
    prior = operator.prior(dimensions)
    annealed = annealed_log_weight(prior, operator, schedule, target, GeneratorNoise.from_seed(0), temperatures)
    annealed_rows, operator.rows = operator.rows, 0
    (sums,) = importance_sampling(
        lambda rows, noise: log_weight(prior, operator, schedule, rows, noise).total, target, (0,), [cost]
    )
    assert annealed_rows == operator.rows == cost * num_steps * repetitions
    error = math.hypot(standard_error(annealed.total), standard_error(sums.estimate))
    assert annealed.total.mean() > sums.estimate.mean() + 5 * error
    assert annealed.total.mean() + 5 * standard_error(annealed.total) < truth
    assert sums.estimate.mean().item() < truth - 20


def test_a_single_temperature_gives_the_log_weight_itself():
    operator = LinearOperator(3, 4)
    schedule = InfusionSchedule(num_steps=4, initial_rate=0.3, target_variance=0.1)
    target = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = operator.prior(3), operator, schedule, target
    annealed = annealed_log_weight(*arguments, GeneratorNoise.from_seed(5), [1.0])
    assert torch.equal(annealed.total, log_weight(*arguments, GeneratorNoise.from_seed(5)).total)
    assert annealed.acceptance_rate.isnan().all()


def test_where_the_log_weight_is_constant_it_is_exact_and_all_is_accepted():
    # An operator that ignores its input, without infusion: ℓ is the last transition's log density whatever the noise.
    last = FactorialGaussian(torch.tensor([0.4, 0.1]), torch.tensor([0.2, 0.3]))
    target = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    annealed = annealed_log_weight(
        last,
        lambda state, step: last.expand(len(state)),
        InfusionSchedule(num_steps=3),
        target,
        GeneratorNoise.from_seed(0),
        inverse_temperatures(9),
    )
    known = distributions.Normal(last.mean, last.variance.sqrt()).log_prob(target).sum(1)
    assert annealed.total.dtype == torch.float64
    torch.testing.assert_close(annealed.total, known.double(), rtol=1e-6, atol=0)
    assert annealed.acceptance_rate.tolist() == [1.0] * 6


def test_the_noise_keeps_its_law_while_it_is_perturbed():
    # At inverse temperatures of next to nothing all is accepted, and the last of 60 chains is as if it were drawn
    # anew: its states are N(μ, v) or, where infused and far from there, N(x, target variance), at the rate asked for.
    n, moves, rate = 20_000, 60, 0.3
    states = []

    def operator(state, step):
        states.append(state.clone())
        return FactorialGaussian(torch.full_like(state, 2.0), torch.full_like(state, 0.5))

    annealed = annealed_log_weight(
        FactorialGaussian(torch.full((1,), 2.0), torch.full((1,), 0.5)),
        operator,
        InfusionSchedule(num_steps=2, initial_rate=rate, target_variance=0.09),
        torch.full((n, 1), 12.0),
        GeneratorNoise.from_seed(0),
        [*(1e-12 * j for j in range(1, moves + 1)), 1.0],
    )
    assert annealed.acceptance_rate.tolist() == [1.0] * n
    assert len(states) == 2 * (moves + 1)
    for first, last in zip(states[:2], states[-2:], strict=True):
        infused = last > 7
        assert abs(infused.double().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
        for part, mean, variance in ((last[infused], 12.0, 0.09), (last[~infused], 2.0, 0.5)):
            assert abs(part.double().mean().item() - mean) < 5 * math.sqrt(variance / len(part))
            assert abs(part.double().var().item() - variance) < 5 * variance * math.sqrt(2 / len(part))
        assert abs(torch.corrcoef(torch.stack([first[:, 0], last[:, 0]]))[0, 1].item()) < 5 / math.sqrt(n)


def test_examples_are_annealed_apart():
    # Chains of an example are accepted and rejected on their own: alone, or with others at once, they are the same.
    operator = LinearOperator(3, 3)
    schedule = InfusionSchedule(num_steps=3, initial_rate=0.2, target_variance=0.1)
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def log_weights(rows, noise):
        return annealed_log_weight(operator.prior(3), operator, schedule, rows, noise, inverse_temperatures(12)).total

    (alone,), (together,) = (importance_sampling(log_weights, target, (1,), [9], rows_at_once=rows) for rows in (4, 36))
    torch.testing.assert_close(together.values, alone.values, rtol=1e-10, atol=1e-10)
    with_others = torch.cat([target[:2], target[2:] + 3])
    (changed,) = importance_sampling(log_weights, with_others, (1,), [9])
    torch.testing.assert_close(changed.values[:, :2], alone.values[:, :2], rtol=1e-10, atol=1e-10)


def test_noise_determines_the_weights():
    operator = LinearOperator(3, 3)
    schedule = InfusionSchedule(num_steps=3, initial_rate=0.2)
    first, again, other = (
        annealed_log_weight(
            operator.prior(3),
            operator,
            schedule,
            torch.zeros(5, 3, dtype=torch.float64),
            GeneratorNoise.from_seed(seed),
            inverse_temperatures(6),
        ).total
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_inverse_temperatures_increase_quadratically_to_1(count):
    known = (np.arange(1, count + 1) / count) ** 2
    assert inverse_temperatures(count) == pytest.approx(known.tolist(), rel=1e-15)
    assert inverse_temperatures(count)[-1] == 1


def test_no_temperature_is_refused():
    with pytest.raises(InfusionError, match="at least one temperature, not 0"):
        inverse_temperatures(0)


@pytest.mark.parametrize(
    ("temperatures", "found"),
    [
        ([], "none"),
        ([0.0, 1.0], "2 from 0 to 1"),
        ([0.5, 0.25, 1.0], "3 from 0.5 to 1"),
        ([0.5, 0.5, 1.0], "3 from 0.5 to 1"),
        ([0.5, 0.9], "2 from 0.5 to 0.9"),
        ([0.5, 2.0], "2 from 0.5 to 2"),
        ([math.nan, 1.0], "2 from nan to 1"),
    ],
)
def test_other_temperatures_are_refused(temperatures, found):
    operator = LinearOperator(2, 2)
    with pytest.raises(InfusionError, match=f"from above 0 to exactly 1, not {found}"):
        annealed_log_weight(
            operator.prior(2),
            operator,
            InfusionSchedule(num_steps=2),
            torch.zeros(3, 2, dtype=torch.float64),
            GeneratorNoise.from_seed(0),
            temperatures,
        )

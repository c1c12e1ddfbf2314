import itertools
import math
from decimal import Decimal, localcontext
from typing import Literal

import numpy as np
import pytest
import torch
from torch import distributions

from infusion_core.bound import LogWeight, bound_estimates, log_ratio, log_weight
from infusion_core.chain import infuse, infusion_chain
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import GeneratorNoise
from infusion_core.schedule import InfusionSchedule


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def grid(mean: float, variance: float, target: float, target_variance: float) -> np.ndarray:
    """Points that resolve both components of a mixture, to 12 standard deviations around each."""
    pieces = [
        centre + math.sqrt(spread) * np.linspace(-12, 12, 40_001)
        for centre, spread in [(mean, variance), (target, target_variance)]
    ]
    return np.unique(np.concatenate(pieces))


def expected_log_ratio(mean, variance, target, rate, target_variance) -> float:
    """E_q[log p - log q] in one dimension, by the trapezoidal rule in float64 numpy."""
    z = grid(mean, variance, target, target_variance)
    log_p = log_normal(z, mean, variance)
    q = (1 - rate) * np.exp(log_p) + rate * np.exp(log_normal(z, target, target_variance))
    integrand = np.zeros_like(z)
    inside = q > 1e-300
    integrand[inside] = q[inside] * (log_p[inside] - np.log(q[inside]))
    return float(np.trapezoid(integrand, z))


def of_width(target_variance: float, mask: Literal["value", "pixel"] = "value") -> InfusionSchedule:
    """A schedule of which only the target component and the mask matter."""
    return InfusionSchedule(num_steps=1, target_variance=target_variance, mask=mask)


def standard_error(values: torch.Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


# mean, variance, target, rate, target variance: narrow and wide targets, near and far, rates from rare to certain.
MIXTURES = [
    (0.3, 0.05, 0.7, 0.1, 1e-4),
    (0.3, 0.05, 0.31, 0.02, 1e-4),
    (0.5, 1e-4, 0.52, 0.3, 1e-4),
    (-1.0, 2.0, 1.5, 0.6, 0.25),
    (0.0, 1.0, 0.2, 0.99, 1e-2),
    (0.9, 0.01, 0.2, 1.0, 0.02),
]


@pytest.mark.parametrize(("mean", "variance", "target", "rate", "target_variance"), MIXTURES)
def test_log_ratio_is_that_of_the_mixture_s_density(mean, variance, target, rate, target_variance):
    # Against log p - log q with q written out, where neither density underflows; and ∫ p exp(-log_ratio) = ∫ q = 1.
    z = grid(mean, variance, target, target_variance)
    transition = FactorialGaussian(tensor(mean)[None], tensor(variance)[None])
    ratio = log_ratio(transition, torch.from_numpy(z)[:, None], tensor(target)[None], rate, of_width(target_variance))
    ratio = ratio.numpy()[:, 0]
    log_p, log_target = log_normal(z, mean, variance), log_normal(z, target, target_variance)
    q = (1 - rate) * np.exp(log_p) + rate * np.exp(log_target)
    inside = (log_p > -600) & (log_target > -600)
    assert inside.sum() > 1000
    np.testing.assert_allclose(ratio[inside], log_p[inside] - np.log(q[inside]), rtol=1e-9, atol=1e-9)
    assert np.trapezoid(np.exp(log_p - ratio), z) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(("mean", "variance", "target", "rate", "target_variance"), MIXTURES)
def test_mean_log_ratio_is_the_quadrature_of_the_mixture(mean, variance, target, rate, target_variance):
    # The infusion chain's own draws against E_q[log p - log q]: within 5 standard errors.
    n = 200_000
    transition = FactorialGaussian(tensor(mean), tensor(variance)).expand(n)
    targets = torch.full((n, 1), target, dtype=torch.float64)
    states = infuse(transition, targets, rate, of_width(target_variance), GeneratorNoise.from_seed(1)).state
    ratio = log_ratio(transition, states, targets, rate, of_width(target_variance))
    known = expected_log_ratio(mean, variance, target, rate, target_variance)
    assert known < 0  # minus a Kullback-Leibler divergence
    assert abs(ratio.mean().item() - known) < 5 * standard_error(ratio)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(
    ("z", "mean", "variance", "target", "target_variance"),
    [
        (0.5, 0.0, 1.25e-4, 0.5, 1e-4),  # on the target: δ / p = e^1000
        (0.0, 0.0, 1e-4, 0.5, 1.25e-4),  # on the mean: δ / p = e^-1000
        (1.0, 0.0, 1.0, 0.0, 1e-6),  # e^-500,000
        (0.25, 1.0, 1e-6, 0.25, 1.0),  # e^281,000
        (30.0, 0.0, 1e-4, 1.0, 1e-4),  # far from both, farther from the mean
        (0.5, 0.5, 1e-4, 0.5, 1e-4),  # the two components are one
    ],
)
def test_log_ratio_at_extremes(z, mean, variance, target, target_variance, rate, dtype, tolerance):
    # -log[(1 - α) + α δ/p] in 60-digit decimal arithmetic; its gradient is finite too.
    transition = FactorialGaussian(*(torch.tensor([[v]], dtype=dtype, requires_grad=True) for v in (mean, variance)))
    arguments = torch.tensor([[z]], dtype=dtype), torch.tensor([[target]], dtype=dtype)
    ratio = log_ratio(transition, *arguments, rate, of_width(target_variance))
    with localcontext() as context:
        context.prec = 60
        d_z, d_x = (Decimal(argument.item()) for argument in arguments)
        d_mean, d_variance, width = (
            Decimal(v) for v in (transition.mean.item(), transition.variance.item(), target_variance)
        )
        log_odds = ((d_z - d_mean) ** 2 / d_variance - (d_z - d_x) ** 2 / width + (d_variance / width).ln()) / 2
        known = float(-(1 - Decimal(rate) + Decimal(rate) * log_odds.exp()).ln())
    assert ratio.item() == pytest.approx(known, rel=tolerance, abs=tolerance)
    ratio.sum().backward()
    assert torch.isfinite(transition.mean.grad).all()
    assert torch.isfinite(transition.variance.grad).all()


def test_log_ratio_at_rate_0_is_exactly_zero():
    transition = FactorialGaussian(tensor([0.0, 1.0]), tensor([1e-4, 1.0]))
    ratio = log_ratio(transition, tensor([100.0, -3.0]), tensor([0.0, 1e6]), 0.0, of_width(1e-4))
    assert ratio.tolist() == [[0.0, 0.0]]


def test_log_ratio_at_rate_1_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    z, x, mean = (torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    variance = torch.rand(5, 2, 3, generator=generator, dtype=torch.float64) + 0.1
    known = distributions.Normal(mean, variance.sqrt()).log_prob(z) - distributions.Normal(x, 0.3).log_prob(z)
    ratio = log_ratio(FactorialGaussian(mean, variance), z, x, 1.0, of_width(0.09))
    torch.testing.assert_close(ratio, known, rtol=1e-12, atol=1e-12)


def test_log_ratio_of_a_transition_has_the_closed_form_gradient():
    # d/dθ (log p - log q) = [α δ / q] d/dθ log p: the share of the target component in q times the score.
    generator = torch.Generator().manual_seed(0)
    mean, x = (torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    z = mean + torch.randn(50, 2, generator=generator, dtype=torch.float64)
    mean.requires_grad_()
    ratio = log_ratio(FactorialGaussian(mean, torch.full_like(z, 0.5)), z, x, 0.3, of_width(0.2))
    (gradient,) = torch.autograd.grad(ratio.sum(), mean)
    p, delta = (np.exp(log_normal(z.numpy(), m.detach().numpy(), v)) for m, v in [(mean, 0.5), (x, 0.2)])
    known = 0.3 * delta / (0.7 * p + 0.3 * delta) * (z - mean).detach().numpy() / 0.5
    np.testing.assert_allclose(gradient, known, rtol=1e-10)


# An operator that ignores its input: the model is the Gaussian of its last step.

PRIOR = FactorialGaussian(tensor(0.5, -0.2), tensor(0.3, 0.1))
TARGET = tensor(0.8, 0.1)


def constant_moments(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(0.6, 0.2) + 0.1 * step, tensor(0.3, 0.2) / step


def constant_operator(state: torch.Tensor, step: int) -> FactorialGaussian:
    return FactorialGaussian(*constant_moments(step)).expand(len(state))


def constant_model_log_density(x: torch.Tensor, num_steps: int) -> torch.Tensor:
    mean, variance = constant_moments(num_steps)
    return distributions.Independent(distributions.Normal(mean, variance.sqrt()), 1).log_prob(x)


def test_log_weight_without_infusion_is_the_exact_log_density_sample_by_sample():
    num_steps = 5
    targets = 2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = InfusionSchedule(num_steps=num_steps)
    weight = log_weight(PRIOR, constant_operator, schedule, targets, GeneratorNoise.from_seed(0))
    known = constant_model_log_density(targets, num_steps)
    torch.testing.assert_close(weight.total, known, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.reconstruction, known, rtol=1e-12, atol=1e-12)
    assert torch.equal(weight.prior, torch.zeros(64, dtype=torch.float64))
    assert torch.equal(weight.transitions, torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize("target_variance", [1e-4, 0.04])
def test_addends_of_the_bound_have_their_expectations(target_variance):
    # States are independent here, so that every addend's expectation is a sum of one-dimensional quadratures.
    n, num_steps = 100_000, 4
    schedule = InfusionSchedule(
        num_steps=num_steps, initial_rate=0.05, rate_increment=0.1, target_variance=target_variance
    )
    weight = log_weight(PRIOR, constant_operator, schedule, TARGET.expand(n, 2), GeneratorNoise.from_seed(0))
    known = []
    for step, rate in enumerate([0.05, 0.15, 0.25, 0.35]):
        mean, variance = (PRIOR.mean, PRIOR.variance) if step == 0 else constant_moments(step)
        known.append(
            sum(
                expected_log_ratio(m, v, x, rate, target_variance)
                for m, v, x in zip(mean.tolist(), variance.tolist(), TARGET.tolist(), strict=True)
            )
        )
    assert abs(weight.prior.mean().item() - known[0]) < 5 * standard_error(weight.prior)
    assert abs(weight.transitions.mean().item() - sum(known[1:])) < 5 * standard_error(weight.transitions)
    reconstruction = constant_model_log_density(TARGET[None], num_steps).expand(n)
    torch.testing.assert_close(weight.reconstruction, reconstruction, rtol=1e-12, atol=0)
    # The bound itself lies below the exact log density, by far more than its error.
    assert weight.total.mean().item() + 20 * standard_error(weight.total) < reconstruction[0].item()


def test_importance_sampling_estimate_rises_to_the_exact_log_density():
    # log mean exp ℓ over k chains; for k = 1, 10, 100 averaged over repetitions, each rise beyond 3 standard errors of
    # the difference; for k = 200,000 within 5 standard errors (by the delta method) of the truth.
    n, num_steps = 200_000, 3
    schedule = InfusionSchedule(num_steps=num_steps, initial_rate=0.2, rate_increment=0.1)
    truth = constant_model_log_density(TARGET[None], num_steps).item()
    draws = [
        log_weight(PRIOR, constant_operator, schedule, TARGET.expand(n, 2), GeneratorNoise.from_seed(seed)).total
        for seed in range(4)
    ]
    estimates = [total.view(-1, k).logsumexp(1) - math.log(k) for total, k in zip(draws[:3], (1, 10, 100), strict=True)]
    means, errors = [e.mean().item() for e in estimates], [standard_error(e) for e in estimates]
    for k in range(2):
        assert means[k] + 3 * math.hypot(errors[k], errors[k + 1]) < means[k + 1]
    assert means[2] - 5 * errors[2] < truth
    assert means[0] < truth - 0.5
    weights = draws[3].exp()
    relative_error = standard_error(weights) / weights.mean().item()
    assert relative_error < 0.01
    assert abs(weights.mean().log().item() - truth) < 5 * relative_error


# A linear operator of constant variance: the model is a Gaussian whose moments are propagated in numpy.


class LinearOperator:
    """z⁽ᵗ⁾ = A⁽ᵗ⁾ z + b⁽ᵗ⁾ + noise of variance v⁽ᵗ⁾, different at every step."""

    def __init__(self, dimensions: int) -> None:
        random = np.random.default_rng(dimensions)
        self.matrices = random.normal(size=(5, dimensions, dimensions)) * 0.6
        self.shifts = random.normal(size=(5, dimensions)) * 0.3
        self.variances = random.uniform(0.1, 0.5, size=(5, dimensions))
        self.prior_mean, self.prior_variance = random.normal(size=dimensions), random.uniform(0.5, 2, size=dimensions)

    def __call__(self, state, step):
        matrix, shift, variance = (
            torch.from_numpy(array[step - 1]) for array in (self.matrices, self.shifts, self.variances)
        )
        return FactorialGaussian(state @ matrix.T + shift, variance.expand_as(state))

    @property
    def prior(self) -> FactorialGaussian:
        return FactorialGaussian(torch.from_numpy(self.prior_mean), torch.from_numpy(self.prior_variance))

    def log_marginal(self, x: np.ndarray, num_steps: int) -> float:
        mean, covariance = self.prior_mean, np.diag(self.prior_variance)
        for matrix, shift, variance in list(zip(self.matrices, self.shifts, self.variances, strict=True))[:num_steps]:
            mean, covariance = matrix @ mean + shift, matrix @ covariance @ matrix.T + np.diag(variance)
        deviation = x - mean
        _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
        return -0.5 * float(deviation @ np.linalg.solve(covariance, deviation) + log_det)


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize(
    ("initial", "increment", "target_variance"), [(0.0, 0.0, 1e-4), (0.05, 0.1, 1e-4), (0.3, 0.0, 0.2), (0.0, 0.2, 0.2)]
)
def test_mean_weight_is_the_marginal_density_of_a_linear_gaussian_model(
    initial, increment, target_variance, dimensions, num_steps
):
    # Within 5 standard errors, which are below 2 % of the density; the bound lies below it.
    n = 150_000
    operator = LinearOperator(dimensions)
    schedule = InfusionSchedule(
        num_steps=num_steps, initial_rate=initial, rate_increment=increment, target_variance=target_variance
    )
    for seed, x in enumerate([np.full(dimensions, 0.3), np.linspace(-0.5, 0.5, dimensions)]):
        target = torch.from_numpy(x).expand(n, dimensions)
        total = log_weight(operator.prior, operator, schedule, target, GeneratorNoise.from_seed(seed)).total
        truth = operator.log_marginal(x, num_steps)
        relative = (total - truth).exp()
        assert standard_error(relative) < 0.02
        assert abs(relative.mean().item() - 1) < 5 * standard_error(relative)
        assert total.mean().item() + 5 * standard_error(total) < truth


def test_addends_are_those_of_the_recorded_states():
    # The same noise again: states from the chain, densities of the mixtures from torch.distributions; images of 2 × 2.
    num_steps = 4

    def operator(state, step):
        return FactorialGaussian(torch.sin(state * step), 0.1 + torch.sigmoid(state) / step)

    prior = FactorialGaussian(tensor([0.5, -0.2], [0.1, 0.4]), tensor([0.3, 0.1], [0.2, 1.0]))
    target = torch.rand(9, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = InfusionSchedule(num_steps=num_steps, initial_rate=0.1, rate_increment=0.2, target_variance=0.01)
    weight = log_weight(prior, operator, schedule, target, GeneratorNoise.from_seed(3))
    steps = infusion_chain(prior, operator, schedule, target, GeneratorNoise.from_seed(3))
    states = [step.draw.state for step in steps if step.draw is not None]

    def log_p_minus_log_q(transition, state, rate):
        normal = distributions.Normal(transition.mean.expand_as(state), transition.variance.expand_as(state).sqrt())
        components = distributions.Normal(
            torch.stack([normal.mean, target], -1), torch.stack([normal.stddev, torch.full_like(target, 0.1)], -1)
        )
        weights = distributions.Categorical(tensor(1 - rate, rate).expand(*state.shape, 2))
        mixture = distributions.MixtureSameFamily(weights, components)
        return (normal.log_prob(state) - mixture.log_prob(state)).sum((1, 2))

    known_prior = log_p_minus_log_q(prior, states[0], 0.1)
    known_transitions = sum(
        log_p_minus_log_q(operator(states[t - 1], t), states[t], rate) for t, rate in [(1, 0.3), (2, 0.5), (3, 0.7)]
    )
    last = operator(states[-1], num_steps)
    known_reconstruction = distributions.Normal(last.mean, last.variance.sqrt()).log_prob(target).sum((1, 2))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(weight.prior, known_prior, **close)
    torch.testing.assert_close(weight.transitions, known_transitions, **close)
    torch.testing.assert_close(weight.reconstruction, known_reconstruction, **close)
    torch.testing.assert_close(weight.total, known_prior + known_transitions + known_reconstruction, **close)
    assert weight.total.shape == (9,)


def test_total_is_the_sum_of_the_addends():
    weight = LogWeight(prior=tensor(1.0, 2.0), transitions=tensor(10.0, 20.0), reconstruction=tensor(-100.0, 200.0))
    assert weight.total.tolist() == [-89.0, 222.0]


def test_chain_of_one_step_has_no_transitions():
    schedule = InfusionSchedule(num_steps=1, initial_rate=0.4)
    weight = log_weight(PRIOR, constant_operator, schedule, TARGET.expand(6, 2), GeneratorNoise.from_seed(0))
    assert torch.equal(weight.transitions, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(weight.total, weight.prior + constant_model_log_density(TARGET, 1))
    assert (weight.prior != 0).all()


def test_log_ratio_of_a_pixel_is_that_of_its_channels_together():
    # The mixture of two Gaussians over 3 channels from torch.distributions.
    generator = torch.Generator().manual_seed(0)
    z, x, mean = (torch.randn(5, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    variance = torch.rand(5, 3, 2, 4, generator=generator, dtype=torch.float64) + 0.1
    ratio = log_ratio(FactorialGaussian(mean, variance), z, x, 0.3, of_width(0.2, "pixel"))

    def channels_last(*values):
        return torch.stack([value.movedim(1, -1) for value in values], -2)

    normals = distributions.Normal(
        channels_last(mean, x), channels_last(variance, torch.full_like(variance, 0.2)).sqrt()
    )
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(tensor(0.7, 0.3).expand(5, 2, 4, 2)), distributions.Independent(normals, 1)
    )
    log_p = distributions.Normal(mean, variance.sqrt()).log_prob(z).sum(1)
    known = log_p - mixture.log_prob(z.movedim(1, -1))
    assert ratio.shape == (5, 1, 2, 4)
    torch.testing.assert_close(ratio[:, 0], known, rtol=1e-10, atol=1e-10)
    assert log_ratio(FactorialGaussian(mean, variance), z, x, 0.0, of_width(0.2, "pixel")).shape == (5, 1, 2, 4)


def test_a_pixel_s_log_weight_averages_to_the_closed_form_density():
    # exp ℓ averages to p(x) whatever is infused at once; here the model is a known Gaussian over 2 channels.
    n = 200_000
    schedule = InfusionSchedule(num_steps=3, initial_rate=0.2, target_variance=0.05, mask="pixel")
    total = log_weight(PRIOR, constant_operator, schedule, TARGET.expand(n, 2), GeneratorNoise.from_seed(0)).total
    relative = (total - constant_model_log_density(TARGET, 3)).exp()
    assert standard_error(relative) < 0.02
    assert abs(relative.mean().item() - 1) < 5 * standard_error(relative)


class ScriptedMasks(GeneratorNoise):
    """Noise of a seed, but with given masks."""

    masks: list[torch.Tensor]

    def bernoulli_like(self, like: torch.Tensor, probability: float) -> torch.Tensor:
        return self.masks.pop(0)


@pytest.mark.parametrize("mask", ["value", "pixel"])
def test_component_averaged_addends_are_the_expectations_over_all_masks(mask):
    # Two steps of 2 × 3 values: a step's addend averaged over all of its masks, by enumeration, under the same draws.
    target = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = FactorialGaussian(
        torch.full((2, 3), 0.4, dtype=torch.float64), torch.full((2, 3), 0.2, dtype=torch.float64)
    )

    def operator(state, step):
        return FactorialGaussian(torch.sin(3 * state), 0.1 + state.square())

    schedule = InfusionSchedule(num_steps=2, initial_rate=0.3, rate_increment=0.1, target_variance=0.05, mask=mask)
    shape = (1, 1, 3) if mask == "pixel" else (1, 2, 3)
    first = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5

    def scripted(*masks: torch.Tensor) -> ScriptedMasks:
        noise = ScriptedMasks(torch.Generator().manual_seed(5))
        noise.masks = list(masks)
        return noise

    expected_prior = expected_transitions = 0.0
    for bits in itertools.product([False, True], repeat=math.prod(shape)):
        picked = torch.tensor(bits).view(shape)
        rest = torch.zeros_like(picked)
        share = [math.prod(rate if bit else 1 - rate for bit in bits) for rate in (0.3, 0.4)]
        expected_prior += share[0] * log_weight(prior, operator, schedule, target, scripted(picked, rest)).prior
        weight = log_weight(prior, operator, schedule, target, scripted(first, picked))
        expected_transitions += share[1] * weight.transitions
    sampled, averaged = bound_estimates(prior, operator, schedule, target, scripted(first, first))
    torch.testing.assert_close(averaged.prior, expected_prior, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(averaged.transitions, expected_transitions, rtol=1e-10, atol=1e-10)
    alone = log_weight(prior, operator, schedule, target, scripted(first, first))
    for part in ("prior", "transitions", "reconstruction"):
        assert torch.equal(getattr(sampled, part), getattr(alone, part))
    assert torch.equal(averaged.reconstruction, alone.reconstruction)


def test_the_averaged_bound_has_the_mean_of_the_log_weight_and_less_variance():
    # The mean by quadrature, as above; the variance of both over the same number of chains.
    n, num_steps = 50_000, 4
    schedule = InfusionSchedule(num_steps=num_steps, initial_rate=0.05, rate_increment=0.1, target_variance=1e-4)
    arguments = PRIOR, constant_operator, schedule, TARGET.expand(n, 2)
    sampled, averaged = (estimate.total for estimate in bound_estimates(*arguments, GeneratorNoise.from_seed(0)))
    known = constant_model_log_density(TARGET, num_steps).item()
    for step, rate in enumerate([0.05, 0.15, 0.25, 0.35]):
        mean, variance = (PRIOR.mean, PRIOR.variance) if step == 0 else constant_moments(step)
        for m, v, x in zip(mean.tolist(), variance.tolist(), TARGET.tolist(), strict=True):
            known += expected_log_ratio(m, v, x, rate, 1e-4)
    for estimate in (sampled, averaged):
        assert abs(estimate.mean().item() - known) < 5 * standard_error(estimate)
    assert averaged.var() < 0.2 * sampled.var()


@pytest.mark.parametrize("estimator", [log_weight, lambda *args, **options: bound_estimates(*args, **options)[1]])
def test_output_variance_replaces_the_last_transition_s_and_nothing_else(estimator):
    schedule = InfusionSchedule(num_steps=3, initial_rate=0.2)
    arguments = PRIOR, constant_operator, schedule, TARGET.expand(7, 2)
    own = estimator(*arguments, GeneratorNoise.from_seed(0))
    isotropic = estimator(*arguments, GeneratorNoise.from_seed(0), output_variance=0.07)
    assert torch.equal(own.prior, isotropic.prior)
    assert torch.equal(own.transitions, isotropic.transitions)
    known = distributions.Normal(constant_moments(3)[0], math.sqrt(0.07)).log_prob(TARGET).sum().expand(7)
    torch.testing.assert_close(isotropic.reconstruction, known)

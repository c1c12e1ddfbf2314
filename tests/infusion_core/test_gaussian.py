import math

import numpy as np
import pytest
import torch
from torch import distributions

from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import GeneratorNoise


class ScriptedNormal:
    """Noise whose Gaussian draws are given."""

    def __init__(self, draws: torch.Tensor) -> None:
        self.draws = draws

    def normal_like(self, like: torch.Tensor) -> torch.Tensor:
        assert self.draws.shape == like.shape
        return self.draws


def random_gaussian(*shape: int, seed: int = 0) -> FactorialGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return FactorialGaussian(mean, torch.rand(shape, generator=generator, dtype=torch.float64) * 3 + 1e-3)


@pytest.mark.parametrize("event", [(1,), (5,), (2, 3), (3, 4, 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_log_prob_is_that_of_torch_distributions(event, batched):
    gaussian = random_gaussian(*((7, *event) if batched else event))
    x = torch.randn(7, *event, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    normal = distributions.Normal(gaussian.mean, gaussian.variance.sqrt())
    torch.testing.assert_close(gaussian.log_density(x), normal.log_prob(x).expand_as(x), rtol=1e-12, atol=1e-12)
    expected = distributions.Independent(normal, len(event)).log_prob(x)
    torch.testing.assert_close(gaussian.log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_log_prob_of_a_standard_gaussian_by_hand():
    # -½ (0² + 1² + 2²) - 3/2 log 2π
    standard = FactorialGaussian(torch.zeros(3), torch.ones(3))
    expected = -2.5 - 1.5 * math.log(2 * math.pi)
    assert standard.log_prob(torch.tensor([[0.0, 1.0, 2.0]])).item() == pytest.approx(expected, rel=1e-6)


def test_log_prob_has_the_gradient_of_the_formula():
    # d/dμ = (x - μ) / v and d/dv = ((x - μ)² / v - 1) / 2v.
    gaussian = random_gaussian(4, 3)
    mean, variance = (t.requires_grad_() for t in (gaussian.mean, gaussian.variance))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d_mean, d_variance = torch.autograd.grad(gaussian.log_prob(x).sum(), (mean, variance))
    deviation = (x - mean).detach()
    torch.testing.assert_close(d_mean, deviation / variance.detach())
    torch.testing.assert_close(d_variance, ((deviation**2 / variance - 1) / (2 * variance)).detach())


def test_sample_is_mean_plus_standard_deviation_times_noise():
    gaussian = FactorialGaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 0.25]]))
    sample = gaussian.sample(ScriptedNormal(torch.tensor([[1.5, -3.0]])))
    assert sample.tolist() == [[1 + 2 * 1.5, -2 - 0.5 * 3]]


def test_samples_have_the_moments_of_the_gaussian():
    # Within 5 standard errors: mean √(v/n), variance v √(2/n), covariance of two dimensions √(v₁v₂/n).
    gaussian, n = random_gaussian(3), 100_000
    samples = gaussian.expand(n).sample(GeneratorNoise.from_seed(3))
    assert samples.shape == (n, 3)
    variance = gaussian.variance
    centred = samples - gaussian.mean
    assert (centred.mean(0).abs() < 5 * (variance / n).sqrt()).all()
    assert ((centred.square().mean(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all()
    covariance = centred.T @ centred / n
    bound = 5 * (variance[:, None] * variance / n).sqrt()
    assert (covariance.abs() < bound)[~torch.eye(3, dtype=torch.bool)].all()


def test_fit_is_the_brute_force_maximum_of_the_likelihood():
    # The fit against the best of a grid of 201 × 201 means and variances around the data's.
    data = torch.randn(50, 1, generator=torch.Generator().manual_seed(2)) * 0.7 + 0.3
    fitted = FactorialGaussian.fit(data)
    x = data.numpy().astype(np.float64)[:, 0]
    means, variances = np.linspace(-0.3, 0.9, 201), np.linspace(0.1, 1.2, 201)
    squares = ((x[:, None] - means) ** 2).sum(0)
    likelihood = -0.5 * (squares[:, None] / variances + len(x) * np.log(variances))
    best_mean, best_variance = np.unravel_index(likelihood.argmax(), likelihood.shape)
    assert abs(fitted.mean.item() - means[best_mean]) <= means[1] - means[0]
    assert abs(fitted.variance.item() - variances[best_variance]) <= variances[1] - variances[0]


def test_fit_is_numpy_s_mean_and_biased_variance():
    data = torch.rand(20, 3, 4, generator=torch.Generator().manual_seed(2)) * 5 - 1
    fitted = FactorialGaussian.fit(data)
    reference = data.numpy().astype(np.float64)
    assert fitted.mean.dtype == fitted.variance.dtype == torch.float32
    np.testing.assert_allclose(fitted.mean, reference.mean(0), rtol=1e-6)
    np.testing.assert_allclose(fitted.variance, reference.var(0), rtol=1e-6)


def test_fit_keeps_a_small_variance_beside_a_large_mean():
    # In float32 the sums of squares of these (about 1e6 each) would leave nothing of a variance of 1e-2.
    data = 1000 + 0.1 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(FactorialGaussian.fit(data).variance, data.numpy().astype(np.float64).var(0), rtol=1e-5)


def test_fit_from_sums_over_parts_is_fit_from_all_data():
    data = torch.randn(31, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = data.split([4, 20, 7])
    fitted = FactorialGaussian.from_sums(sum(p.sum(0) for p in parts), sum((p**2).sum(0) for p in parts), 31)
    np.testing.assert_allclose(fitted.mean, data.numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(fitted.variance, data.numpy().var(0), rtol=1e-6)


def test_variance_floor_is_the_constrained_maximum():
    # Two dimensions, one with a variance below the floor: there the best variance ≥ floor of a fine grid is the floor.
    floor = 0.2
    spread = torch.tensor([0.1, 2.0], dtype=torch.float64)
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * spread
    fitted = FactorialGaussian.fit(data, variance_floor=floor)
    x = data.numpy()
    grid = np.geomspace(floor, 20, 5000)
    squares = ((x - x.mean(0)) ** 2).sum(0)
    likelihood = -0.5 * (squares[:, None] / grid + len(x) * np.log(grid))
    np.testing.assert_allclose(fitted.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(fitted.variance, grid[likelihood.argmax(1)], rtol=2e-3)
    assert fitted.variance[0].item() == pytest.approx(floor)
    assert fitted.variance[1].item() == pytest.approx(x[:, 1].var())


def test_fit_to_no_examples_is_refused():
    with pytest.raises(InfusionError, match="at least one"):
        FactorialGaussian.fit(torch.empty(0, 3))
    with pytest.raises(InfusionError, match="at least one"):
        FactorialGaussian.from_sums(torch.zeros(3), torch.zeros(3), 0)


@pytest.mark.parametrize("variance_shape", [(2, 3), (2, 1), (1, 3), (3,), ()])
@pytest.mark.parametrize("batch", [2, 5])
def test_expand_is_the_same_gaussian_for_every_example(variance_shape, batch):
    # Also with a variance of fewer dimensions, which broadcasts to the mean's.
    mean = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    variance = torch.rand(variance_shape, generator=torch.Generator().manual_seed(1)) + 0.5
    x = torch.randn(batch, 2, 3, generator=torch.Generator().manual_seed(2))
    expanded = FactorialGaussian(mean, variance).expand(batch)
    assert expanded.mean.shape == (batch, 2, 3)
    assert expanded.mean.data_ptr() == mean.data_ptr()
    expected = distributions.Independent(distributions.Normal(mean, variance.expand(2, 3).sqrt()), 2).log_prob(x)
    torch.testing.assert_close(expanded.log_prob(x), expected)


def test_detach_stops_gradients():
    mean, variance = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    gaussian = FactorialGaussian(mean, variance)
    x = torch.ones(2, 3)
    assert gaussian.log_prob(x).requires_grad
    assert not gaussian.detach().log_prob(x).requires_grad
    assert torch.equal(gaussian.detach().log_prob(x), gaussian.log_prob(x))

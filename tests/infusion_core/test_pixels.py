import math

import numpy as np
import pytest
import torch

from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import GeneratorNoise
from infusion_core.pixels import bits_per_dimension, dequantise, fit_to_pixels, quantise


class ConstantUniform:
    """Noise whose uniform draws are all the same number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform_like(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, self.value)


# The least number U[0, 1) gives, a middle one, some that float32 rounds up when a grey level is added, the greatest.
UNIFORMS = [0.0, 2.0**-24, 0.5, 1 - 2.0**-10, 1 - 2.0**-18, 1 - 2.0**-20, 1 - 2.0**-22, 1 - 2.0**-24]


@pytest.mark.parametrize("uniform", UNIFORMS)
@pytest.mark.parametrize("levels", [2, 16, 17, 256])
def test_dequantise_is_grey_level_plus_noise_over_levels(levels, uniform):
    grey = torch.arange(levels, dtype=torch.uint8).view(-1, 1, 1)
    x = dequantise(grey, levels, ConstantUniform(uniform))
    assert x.dtype == torch.float32
    assert x.shape == grey.shape
    # To float32's rounding, and to that of U itself beside a large grey level.
    np.testing.assert_allclose(x, (grey.numpy() + np.float64(uniform)) / levels, rtol=1.5e-7, atol=2.0**-15 / levels)
    assert grey.tolist() == torch.arange(levels).view(-1, 1, 1).tolist()


@pytest.mark.parametrize("uniform", UNIFORMS)
@pytest.mark.parametrize("levels", [2, 16, 17, 256])
def test_dequantised_pixels_are_in_0_1(levels, uniform):
    # (255 + U) / 256 rounds to 1 for U close to 1.
    x = dequantise(torch.tensor([0, levels - 1], dtype=torch.uint8), levels, ConstantUniform(uniform))
    assert x.min() >= 0
    assert x.max() < 1


@pytest.mark.parametrize("uniform", UNIFORMS)
def test_quantise_inverts_dequantise(uniform):
    # Whatever the noise, a pixel stays in the cell of its grey level; for every number of levels there can be.
    wrong = []
    for levels in range(2, 257):
        grey = torch.arange(levels, dtype=torch.uint8)
        if not torch.equal(quantise(dequantise(grey, levels, ConstantUniform(uniform)), levels), grey):
            wrong.append(levels)
    assert wrong == []


@pytest.mark.parametrize(("levels", "grey"), [(256, 0), (256, 130), (256, 255), (17, 16)])
def test_dequantised_pixels_are_uniform_in_their_cell(levels, grey):
    # Mean (u + ½) / L, variance 1 / 12 L² (standard error of a uniform's: √(1/180 n) / L²), eighths equally full.
    n = 80_000
    x = dequantise(torch.full((n,), grey, dtype=torch.uint8), levels, GeneratorNoise.from_seed(7)).double() * levels
    u = x - grey
    assert u.min() >= 0
    assert u.max() <= 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs((u - 0.5).square().mean() - 1 / 12) < 5 / math.sqrt(180 * n)
    eighths = torch.histc(u, 8, 0, 1) / n
    assert (eighths - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 * 7 / 8 / n)
    assert abs(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean()) < 5 / (12 * math.sqrt(n))  # one draw a pixel


def test_quantise_takes_the_cell_and_the_nearest_level_outside():
    x = torch.tensor([-0.3, 0.0, 0.2499, 0.25, 0.5, 0.9999, 1.0, 7.0])
    assert quantise(x, 4).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert quantise(x, 4).dtype == torch.uint8
    assert quantise(torch.tensor([0.999]), 256).item() == 255


def test_pixel_fit_is_the_fit_to_an_explicit_average_over_the_noise():
    # Every image repeated with U at the midpoints of K equal cells: mean exact, variance exact up to 1 / 12 K² L².
    levels, k = 17, 400
    images = torch.randint(0, levels, (9, 2, 3), generator=torch.Generator().manual_seed(0))
    midpoints = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    explicit = ((images[:, None] + midpoints[:, None, None]) / levels).flatten(0, 1)
    fitted = fit_to_pixels(images.sum(0), images.square().sum(0), len(images), levels)
    np.testing.assert_allclose(fitted.mean, explicit.numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(fitted.variance, explicit.numpy().var(0), rtol=1e-5)


def test_pixel_fit_is_the_exact_expectation():
    # E[x] = E[u + ½] / L and Var[x] = (Var[u] + 1/12) / L², from the sums that a manifest holds; 7 is a constant pixel.
    images = np.array([[0, 255, 7], [10, 0, 7], [255, 128, 7], [3, 3, 7]], dtype=np.int64)
    sums = torch.from_numpy(images.sum(0)), torch.from_numpy((images**2).sum(0))
    fitted = fit_to_pixels(*sums, 4, 256)
    np.testing.assert_allclose(fitted.mean, (images.mean(0) + 0.5) / 256, rtol=1e-6)
    np.testing.assert_allclose(fitted.variance, (images.var(0) + 1 / 12) / 256**2, rtol=1e-6)


def test_pixel_fit_is_the_limit_of_fits_to_dequantised_images():
    # 20 images, dequantised 5000 times: mean and variance within 5 standard errors of a uniform's.
    levels, repeats = 256, 5000
    images = torch.randint(0, levels, (20, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise = GeneratorNoise.from_seed(1)
    sampled = FactorialGaussian.fit(torch.cat([dequantise(images, levels, noise) for _ in range(repeats)]))
    fitted = fit_to_pixels(images.double().sum(0), images.double().square().sum(0), 20, levels)
    n = 20 * repeats
    spread = images.double().std(0) / levels  # var x ≈ var u: its error is 2 cov(u, U) and that of U's own variance
    assert ((sampled.mean - fitted.mean).abs() < 5 / levels / math.sqrt(12 * n) + 1e-7).all()
    bound = 5 * (2 * spread / levels / math.sqrt(12 * n) + 1 / levels**2 / math.sqrt(180 * n)) + 1e-7
    assert ((sampled.variance - fitted.variance).abs() < bound).all()


def test_pixel_fit_takes_a_floor_and_refuses_no_images():
    constant = fit_to_pixels(torch.tensor([40.0]), torch.tensor([160.0]), 10, 256)
    assert constant.variance.item() == pytest.approx(1 / 12 / 256**2, rel=1e-6)
    floored = fit_to_pixels(torch.tensor([40.0]), torch.tensor([160.0]), 10, 256, variance_floor=1e-4)
    assert floored.variance.item() == pytest.approx(1e-4, rel=1e-6)
    with pytest.raises(InfusionError, match="at least one"):
        fit_to_pixels(torch.zeros(1), torch.zeros(1), 0, 256)


@pytest.mark.parametrize(
    ("nats", "dimensions", "levels", "bits"),
    [
        (0.0, 784, 256, 8.0),  # the uniform density on [0, 1)ᴰ
        (784 * math.log(2), 784, 256, 7.0),
        (-10 * math.log(2), 10, 2, 2.0),
        (840.0, 784, 256, 6.454255),  # 8 - 840 / 543.42739 = 8 - 1.545745
        (0.0, 64, 17, 4.087463),
        (100.0, 64, 17, 1.833252),  # 4.087463 - 100 / 44.361420 = 4.087463 - 2.254211
    ],
)
def test_bits_per_dimension_by_hand(nats, dimensions, levels, bits):
    assert bits_per_dimension(nats, dimensions, levels) == pytest.approx(bits, abs=1e-6)


def test_bits_per_dimension_of_a_discrete_distribution_are_its_entropy():
    # A density that is constant on every cell is the distribution over grey levels itself: its bits are the entropy.
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    nats = (probabilities * np.log(4 * probabilities)).sum()
    assert bits_per_dimension(nats, 1, 4) == pytest.approx(1.75)


@pytest.mark.parametrize(("floor", "cap"), [(1e-4, 2885), (1e-6, 4197)])
def test_variance_floor_caps_the_log_likelihood_of_an_image(floor, cap):
    # A model that knows all 784 grey levels, with the variance at its floor, reaches what DESIGN.md says is the most:
    # 784 [-½ log 2πε - 1 / (24 ε 256²)] nats.
    grey = torch.randint(0, 256, (784,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    model = FactorialGaussian((grey + 0.5) / 256, torch.full((784,), floor))
    noise = GeneratorNoise.from_seed(2)
    nats = model.log_prob(torch.stack([dequantise(grey, 256, noise) for _ in range(400)]))
    assert nats.mean().item() == pytest.approx(cap, abs=0.5 + 4 * nats.std().item() / math.sqrt(400))

import math

import numpy as np
import pytest
import torch
from torch import distributions

from infusion_core import parzen
from infusion_core.errors import InfusionError
from infusion_core.parzen import ParzenEstimate, choose_bandwidth, parzen_estimate, parzen_estimates


def images(count: int, *event: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.rand(count, *event, generator=torch.Generator().manual_seed(seed)) + offset


def brute_force(examples: torch.Tensor, samples: torch.Tensor, bandwidth: float) -> np.ndarray:
    """Every density of every pair formed by extended-precision numpy, and summed."""
    x, y = (t.numpy().reshape(len(t), -1).astype(np.longdouble) for t in (examples, samples))
    log_densities = np.array(
        [
            [-((a - b) ** 2).sum() / (2 * bandwidth**2) - len(a) / 2 * math.log(2 * math.pi * bandwidth**2) for b in y]
            for a in x
        ]
    )
    largest = log_densities.max(1)
    return (np.log(np.exp(log_densities - largest[:, None]).mean(1)) + largest).astype(float)


@pytest.fixture(params=[None, (3, 4), (7, 1)])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(parzen, "_EXAMPLES_AT_ONCE", request.param[0])
        monkeypatch.setattr(parzen, "_SAMPLES_AT_ONCE", request.param[1])


@pytest.mark.parametrize("event", [(1,), (5,), (2, 3, 4)])
def test_estimate_is_the_brute_force_sum(event, blocks):
    # From bandwidths at which the nearest sample decides, and all exponentials underflow, to ones where all count.
    examples, samples = images(10, *event, seed=0), images(23, *event, seed=1)
    bandwidths = [0.003, 0.17, 2.0]
    estimates = parzen_estimates(examples, samples.split([1, 15, 7]), bandwidths)
    for bandwidth, estimate in zip(bandwidths, estimates, strict=True):
        assert estimate.bandwidth == bandwidth
        assert estimate.log_densities.dtype == torch.float64
        np.testing.assert_allclose(estimate.log_densities, brute_force(examples, samples, bandwidth), rtol=1e-10)


def test_estimate_from_one_sample_is_a_gaussian_density():
    examples, sample = images(6, 2, 3, seed=0).double(), images(1, 2, 3, seed=1).double()
    normal = distributions.Independent(distributions.Normal(sample[0], 0.17), 2)
    estimate = parzen_estimate(examples, [sample], 0.17)
    torch.testing.assert_close(estimate.log_densities, normal.log_prob(examples), rtol=1e-12, atol=1e-12)


def test_an_offset_of_all_images_costs_no_precision():
    # Squares of 1e5 would leave nothing of differences of 1e-3 in the expansion of ‖x - y‖².
    examples, samples = (1e-3 * images(5, 4, seed=seed).double() + 1e5 for seed in (0, 1))
    estimate = parzen_estimate(examples, [samples], 1e-3)
    np.testing.assert_allclose(estimate.log_densities, brute_force(examples, samples, 1e-3), rtol=1e-8)


def test_batches_of_samples_may_be_empty():
    examples, samples = images(4, 3, seed=0), images(5, 3, seed=1)
    with_empty = parzen_estimate(examples, [samples[:2], samples[:0], samples[2:]], 0.2)
    np.testing.assert_allclose(with_empty.log_densities, brute_force(examples, samples, 0.2), rtol=1e-12)


def test_the_samples_are_passed_over_once():
    examples, samples = images(4, 3, seed=0), images(9, 3, seed=1)
    once = parzen_estimates(examples, iter(samples.split(2)), [0.1, 0.3])
    for estimate, bandwidth in zip(once, (0.1, 0.3), strict=True):
        np.testing.assert_allclose(estimate.log_densities, brute_force(examples, samples, bandwidth), rtol=1e-10)


def test_mean_and_standard_error_are_numpy_s():
    densities = torch.randn(40, generator=torch.Generator().manual_seed(0)).double() * 7 + 300
    estimate = ParzenEstimate(0.17, densities)
    assert estimate.mean == pytest.approx(densities.numpy().mean(), rel=1e-14)
    assert estimate.standard_error == pytest.approx(densities.numpy().std(ddof=1) / math.sqrt(40), rel=1e-12)
    assert math.isnan(ParzenEstimate(0.17, densities[:1]).standard_error)


def test_the_bandwidth_chosen_is_the_maximum_of_the_likelihood():
    # One sample y: the best σ² is the mean of ‖x - y‖² / D, exactly; it is put among others close to it.
    validation, sample = images(30, 2, 4, seed=0), images(1, 2, 4, seed=1)
    best = math.sqrt((validation - sample).double().square().mean().item())
    assert choose_bandwidth(validation, [sample], [0.5 * best, 0.99 * best, best, 1.01 * best, 2 * best]) == best


def test_the_bandwidth_chosen_has_the_best_brute_force_mean():
    validation, samples = images(12, 3, seed=0), images(40, 3, seed=1)
    grid = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    known = max(grid, key=lambda bandwidth: brute_force(validation, samples, bandwidth).mean())
    assert grid[0] < known < grid[-1]
    assert choose_bandwidth(validation, samples.split(7), grid) == known


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": []}, "needs at least one sample; none was given"),
        ({"samples": [torch.empty(0, 3)]}, "needs at least one sample; none was given"),
        ({"examples": torch.empty(0, 3)}, "needs at least one example"),
        ({"bandwidths": []}, r"bandwidth σ above 0, not \[\]"),
        ({"bandwidths": [0.1, 0.0]}, r"bandwidth σ above 0, not \[0.1, 0.0\]"),
        ({"bandwidths": [-0.1]}, r"bandwidth σ above 0, not \[-0.1\]"),
        ({"bandwidths": [math.nan]}, r"bandwidth σ above 0, not \[nan\]"),
        ({"samples": [torch.zeros(2, 4)]}, r"shape \(4,\) cannot be compared with examples of shape \(3,\)"),
        ({"samples": [torch.zeros(5, 3), torch.full((2, 3), math.nan)]}, "samples 5 to 6 is not of finite numbers"),
    ],
)
def test_arguments_out_of_range_are_refused(changed, message):
    arguments = {"examples": torch.zeros(4, 3), "samples": [torch.zeros(2, 3)], "bandwidths": [0.1]} | changed
    with pytest.raises(InfusionError, match=message):
        parzen_estimates(**arguments)

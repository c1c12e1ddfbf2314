import math

import numpy as np
import pytest
import torch

from infusion_core.chain import infuse, infusion_chain, sampling_chain, sampling_trajectory
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import GeneratorNoise
from infusion_core.operator import MLPOperator
from infusion_core.schedule import InfusionSchedule

DIMENSIONS = 3


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PRIOR = FactorialGaussian(vector(0.5, -1, 2), vector(1, 0.25, 4))
TARGET = vector(3, 0.5, -2)


class ConstantOperator:
    """Ignores the state; every step has a mean and a variance of its own. Remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, int]] = []

    @staticmethod
    def moments(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return vector(1, -1, 0) * step, vector(0.5, 1, 2) / step

    def __call__(self, state: torch.Tensor, step: int) -> FactorialGaussian:
        self.calls.append((state, step))
        return FactorialGaussian(*self.moments(step)).expand(len(state))


class LinearOperator:
    """Mean A z + b, variance v."""

    matrix = torch.tensor([[0.5, 0.3, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.4, -0.6]], dtype=torch.float64)
    shift = vector(0.1, 0.2, -0.3)
    variance = vector(0.3, 0.02, 0.5)

    def __call__(self, state: torch.Tensor, step: int) -> FactorialGaussian:
        return FactorialGaussian(state @ self.matrix.T + self.shift, self.variance.expand_as(state))


class ScriptedNoise:
    """Gives the masks and Gaussian draws it was given, and keeps count."""

    def __init__(self, masks: list[torch.Tensor], normals: list[torch.Tensor]) -> None:
        self.masks, self.normals, self.probabilities = masks, normals, []

    def normal_like(self, like: torch.Tensor) -> torch.Tensor:
        return self.normals.pop(0)

    def bernoulli_like(self, like: torch.Tensor, probability: float) -> torch.Tensor:
        self.probabilities.append(probability)
        return self.masks.pop(0)


def assert_moments(samples: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, fourth: torch.Tensor) -> None:
    """Mean and variance per dimension within 5 standard errors; `fourth` is the fourth central moment."""
    n = len(samples)
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    second = (samples - mean).square().mean(0)
    assert ((second - variance).abs() < 5 * ((fourth - variance**2) / n).sqrt()).all()


def assert_gaussian(samples: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    assert_moments(samples, mean, variance, 3 * variance**2)


def run(schedule: InfusionSchedule, n: int, seed: int = 0):
    operator = ConstantOperator()
    noise = GeneratorNoise.from_seed(seed)
    return list(infusion_chain(PRIOR, operator, schedule, TARGET.expand(n, DIMENSIONS), noise)), operator


def test_infusion_is_target_or_model_dimension_by_dimension():
    # z = x + √v_δ ε where the mask is set, μ + √v ε elsewhere, by hand.
    transition = FactorialGaussian(vector(1, 2, 3)[None], vector(4, 9, 16)[None])
    noise = ScriptedNoise([torch.tensor([[True, False, True]])], [vector(1, -1, 2)[None]])
    schedule = InfusionSchedule(num_steps=1, target_variance=0.25)
    draw = infuse(transition, vector(10, 20, 30)[None], 0.4, schedule, noise)
    assert draw.from_model.tolist() == [[1 + 2 * 1, 2 + 3 * -1, 3 + 4 * 2]]
    assert draw.from_target.tolist() == [[10 + 0.5 * 1, 20 + 0.5 * -1, 30 + 0.5 * 2]]
    assert draw.state.tolist() == [[10 + 0.5 * 1, 2 + 3 * -1, 30 + 0.5 * 2]]
    assert noise.probabilities == [0.4]


def test_rate_1_gives_the_target_component():
    steps, _ = run(InfusionSchedule(num_steps=3, initial_rate=1.0, target_variance=0.04), 50_000)
    for step in steps[:-1]:
        assert_gaussian(step.draw.state, TARGET, torch.full_like(TARGET, 0.04))


def test_rate_0_gives_the_model():
    # Closed-form moments of every state, and the same bits as the sampling chain under the same noise.
    n, num_steps = 50_000, 4
    steps, operator = run(InfusionSchedule(num_steps=num_steps), n)
    assert_gaussian(steps[0].draw.state, PRIOR.mean, PRIOR.variance)
    for step in steps[1:-1]:
        assert_gaussian(step.draw.state, *operator.moments(step.step))
    sampled = sampling_chain(PRIOR, operator, num_steps - 1, n, GeneratorNoise.from_seed(0))
    for step, sample in zip(steps[:-1], sampled, strict=True):
        assert torch.equal(step.draw.state, sample.state)


def test_states_have_the_moments_of_the_mixture():
    # Mean, variance and fourth central moment of (1-α) N(μ, v) + α N(x, v_δ); increasing rates 0.1, 0.3, 0.5, 0.7.
    n, width = 100_000, 0.09
    schedule = InfusionSchedule(num_steps=4, initial_rate=0.1, rate_increment=0.2, target_variance=width)
    steps, operator = run(schedule, n)
    for step, rate in zip(steps[:-1], [0.1, 0.3, 0.5, 0.7], strict=True):
        mu, v = (PRIOR.mean, PRIOR.variance) if step.step == 0 else operator.moments(step.step)
        mean = (1 - rate) * mu + rate * TARGET
        variance, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
        for weight, centre, spread in [(1 - rate, mu, v), (rate, TARGET, torch.tensor(width))]:
            d = centre - mean
            variance += weight * (d**2 + spread)
            fourth += weight * (d**4 + 6 * d**2 * spread + 3 * spread**2)
        assert_moments(step.draw.state, mean, variance, fourth)
        # Dimensions are infused independently: given the target, their covariance is zero.
        centred = (step.draw.state - mean) / variance.sqrt()
        correlation = (centred.T @ centred / n)[~torch.eye(DIMENSIONS, dtype=torch.bool)]
        assert correlation.abs().max() < 5 / math.sqrt(n)


def test_chain_has_the_schedule_s_steps_and_the_last_draws_nothing():
    # T = 3: three states from three masks and three Gaussian draws; the step T is the operator's alone.
    batch, num_steps = 2, 3
    schedule = InfusionSchedule(num_steps=num_steps, initial_rate=0.1, rate_increment=0.2)
    masks = [torch.zeros(batch, DIMENSIONS, dtype=torch.bool) for _ in range(num_steps)]
    normals = [torch.zeros(batch, DIMENSIONS, dtype=torch.float64) for _ in range(num_steps)]
    noise = ScriptedNoise(masks, normals)  # raises IndexError when asked for more
    operator = ConstantOperator()
    steps = list(infusion_chain(PRIOR, operator, schedule, TARGET.expand(batch, DIMENSIONS), noise))
    assert noise.masks == noise.normals == []
    assert noise.probabilities == pytest.approx([0.1, 0.3, 0.5])
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert [step.rate for step in steps[:-1]] == noise.probabilities
    assert steps[-1].draw is None
    assert torch.equal(steps[0].transition.mean, PRIOR.mean.expand(batch, DIMENSIONS))
    for step in steps[1:]:
        mean, variance = operator.moments(step.step)
        assert torch.equal(step.transition.mean, mean.expand(batch, DIMENSIONS))
        assert torch.equal(step.transition.variance, variance.expand(batch, DIMENSIONS))
    # Nothing infused and no noise: every state is its transition's mean.
    assert all(torch.equal(step.draw.state, step.transition.mean) for step in steps[:-1])


def test_operator_sees_each_state_with_the_number_of_the_next_step():
    steps, operator = run(InfusionSchedule(num_steps=5, initial_rate=0.3), 4)
    assert [step for _, step in operator.calls] == [1, 2, 3, 4, 5]
    for (state, number), step in zip(operator.calls, steps, strict=False):
        assert number == step.step + 1
        assert state is step.draw.state


def test_chain_computes_a_step_when_asked_for_it():
    operator = ConstantOperator()
    schedule = InfusionSchedule(num_steps=5, initial_rate=0.3)
    chain = infusion_chain(PRIOR, operator, schedule, TARGET.expand(4, DIMENSIONS), GeneratorNoise.from_seed(0))
    for calls in range(6):
        next(chain)
        assert len(operator.calls) == calls


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_states_are_constants_and_transitions_are_not(rate):
    # A gradient of step t's transition reaches the parameters of that step's call only.
    scales = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def operator(state, step):
        return FactorialGaussian(state * scales[step - 1], torch.ones_like(state) * scales[step - 1])

    schedule = InfusionSchedule(num_steps=3, initial_rate=rate)
    target = TARGET.expand(4, DIMENSIONS)
    steps = list(infusion_chain(PRIOR, operator, schedule, target, GeneratorNoise.from_seed(0)))
    assert not any(step.draw.state.requires_grad for step in steps[:-1])
    for step in steps[1:]:
        (gradient,) = torch.autograd.grad(step.transition.log_prob(target).sum(), scales)
        assert (gradient != 0).tolist() == [number == step.step for number in (1, 2, 3)]


def test_reparametrised_states_carry_the_gradient_through_the_chain():
    # z⁽²⁾ = μ₂ + √v₂ ε with μ₂ = a₂ (μ₁ + √v₁ ε'), μ₁ = a₁ z⁽⁰⁾, by hand; infused dimensions carry none.
    scales = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    draws = [vector(0.5, -1, 2)[None] for _ in range(3)]
    masks = [torch.zeros(1, DIMENSIONS, dtype=torch.bool) for _ in range(2)]
    masks.append(torch.tensor([[False, True, False]]))

    def operator(state, step):
        return FactorialGaussian(state * scales[step - 1], torch.ones_like(state))

    schedule = InfusionSchedule(num_steps=3, initial_rate=0.5)
    noise = ScriptedNoise(masks, draws)
    steps = list(infusion_chain(PRIOR, operator, schedule, TARGET[None], noise, reparametrised=True))
    z0, _, z2 = (step.draw.state for step in steps[:-1])
    assert not z0.requires_grad
    for dimension, eps in ((0, 0.5), (2, 2.0)):
        (gradient,) = torch.autograd.grad(z2[0, dimension], scales, retain_graph=True)
        z1 = 2 * z0[0, dimension].item() + eps
        assert gradient.tolist() == pytest.approx([3 * z0[0, dimension].item(), z1, 0])
    (gradient,) = torch.autograd.grad(z2[0, 1], scales)
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mask", ["value", "pixel"])
def test_a_pixel_s_channels_are_infused_together_where_the_mask_says_so(mask):
    # With components far apart, it can be told from a state what was infused: α of the pixels, or of the values.
    transition = FactorialGaussian(torch.zeros(2000, 3, 4, 5), torch.full((2000, 3, 4, 5), 1e-4))
    schedule = InfusionSchedule(num_steps=1, mask=mask)
    draw = infuse(transition, torch.ones(2000, 3, 4, 5), 0.3, schedule, GeneratorNoise.from_seed(0))
    infused = draw.state > 0.5
    assert infused.double().mean().item() == pytest.approx(0.3, abs=0.01)
    together = (infused.all(1) | ~infused.any(1)).double().mean().item()
    assert together == (1 if mask == "pixel" else pytest.approx(0.3**3 + 0.7**3, abs=0.01))


def test_clamp_is_applied_to_every_state_before_it_is_used():
    operator = ConstantOperator()
    chain = sampling_chain(
        PRIOR, operator, 3, 5, GeneratorNoise.from_seed(0), clamp=lambda state: torch.full_like(state, 7.0)
    )
    steps = list(chain)
    assert all((step.state == 7).all() for step in steps)
    assert all((state == 7).all() for state, _ in operator.calls)
    assert torch.equal(steps[0].transition.mean, PRIOR.mean.expand(5, DIMENSIONS))


def test_sampling_chain_with_an_operator_that_ignores_the_state():
    n = 50_000
    steps = list(sampling_chain(PRIOR, ConstantOperator(), 3, n, GeneratorNoise.from_seed(0)))
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert_gaussian(steps[0].state, PRIOR.mean, PRIOR.variance)
    for step in steps[1:]:
        assert_gaussian(step.state, *ConstantOperator.moments(step.step))


def test_sampling_chain_with_a_linear_operator():
    # Mean m ← A m + b, covariance S ← A S Aᵀ + diag v in numpy; to 5 standard errors, here √((S_ii S_jj + S_ij²) / n).
    n, num_steps = 100_000, 4
    a, b, v = (t.numpy() for t in (LinearOperator.matrix, LinearOperator.shift, LinearOperator.variance))
    mean, covariance = PRIOR.mean.numpy(), np.diag(PRIOR.variance.numpy())
    for step in sampling_chain(PRIOR, LinearOperator(), num_steps, n, GeneratorNoise.from_seed(0)):
        if step.step > 0:
            mean, covariance = a @ mean + b, a @ covariance @ a.T + np.diag(v)
        samples = step.state.numpy()
        spread = np.diag(covariance)
        assert (np.abs(samples.mean(0) - mean) < 5 * np.sqrt(spread / n)).all()
        centred = samples - mean
        error = np.sqrt((np.outer(spread, spread) + covariance**2) / n)
        assert (np.abs(centred.T @ centred / n - covariance) < 5 * error).all()
    assert step.step == num_steps


def test_trajectory_is_the_whole_chain():
    operator = LinearOperator()
    trajectory = sampling_trajectory(PRIOR, operator, 4, 7, GeneratorNoise.from_seed(5))
    assert trajectory.states.shape == trajectory.means.shape == (5, 7, DIMENSIONS)
    assert torch.equal(trajectory.means[0], PRIOR.mean.expand(7, DIMENSIONS))
    for step in range(1, 5):
        expected = trajectory.states[step - 1] @ operator.matrix.T + operator.shift
        torch.testing.assert_close(trajectory.means[step], expected, rtol=1e-12, atol=1e-12)
    # What is left of a state without its mean and scale is the noise: standard, and new at every step.
    scale = torch.stack([PRIOR.variance] + [operator.variance] * 4).sqrt()[:, None]
    noise = (trajectory.states - trajectory.means) / scale
    again = GeneratorNoise.from_seed(5)
    for step in range(5):
        expected = again.normal_like(torch.empty(7, DIMENSIONS, dtype=torch.float64))
        torch.testing.assert_close(noise[step], expected, rtol=1e-9, atol=1e-9)


def test_sampling_may_go_on_beyond_the_steps_trained():
    # The operator has two steps; steps 3 to 6 use the normalisation of step 2, which is not that of step 1.
    operator = MLPOperator((1, 2, 2), 2, hidden_sizes=(4,)).eval()
    with torch.no_grad():
        operator.norms[0].weight[1] = 3
        operator.norms[0].running_mean[1] = 0.2
    prior = FactorialGaussian(torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 2))
    with torch.no_grad():
        trajectory = sampling_trajectory(prior, operator, 6, 5, GeneratorNoise.from_seed(0))
        assert trajectory.states.shape == (7, 5, 1, 2, 2)
        for step in range(2, 7):
            assert torch.equal(trajectory.means[step], operator(trajectory.states[step - 1], 2).mean)
            assert not torch.equal(trajectory.means[step], operator(trajectory.states[step - 1], 1).mean)


@pytest.mark.parametrize("operator", [ConstantOperator(), LinearOperator()])
def test_a_seed_determines_the_samples(operator):
    first, again, other = (
        sampling_trajectory(PRIOR, operator, 3, 6, GeneratorNoise.from_seed(*seed)) for seed in [(1, 2), (1, 2), (2, 1)]
    )
    assert torch.equal(first.states, again.states)
    assert not torch.equal(first.states[-1], other.states[-1])

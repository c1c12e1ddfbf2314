import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import distributions, nn
from torch.nn.parallel import DistributedDataParallel

from infusion_core.bound import log_weight
from infusion_core.chain import infusion_chain
from infusion_core.convolutional import ConvolutionalOperator
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import ConcatenatedNoise, GeneratorNoise
from infusion_core.normalization import StepBatchNorm
from infusion_core.objective import (
    OBJECTIVES,
    Objective,
    denoising_losses,
    lower_bound_losses,
    reparametrised_lower_bound_losses,
)
from infusion_core.operator import MLPOperator, TransitionOperator
from infusion_core.pixels import dequantise
from infusion_core.schedule import InfusionSchedule

EVENT = (2, 3)
BATCH = 8


class SmoothOperator(TransitionOperator):
    """A small network in float64 without kinks: per-step batch normalisation, tanh, mean and variance."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.linear = nn.Linear(6, 5, bias=False)
        self.norm = StepBatchNorm(num_steps, 5)
        self.head = nn.Linear(5, 12)
        self.double()

    def forward(self, state, step):
        features = torch.tanh(self.norm(self.linear(state.flatten(1)), step))
        mean, variance = self.head(features).view(-1, 2, *EVENT).unbind(1)
        return FactorialGaussian(mean, nn.functional.softplus(variance) + 0.05)


class Recorder:
    """Passes states on to an operator and remembers them."""

    def __init__(self, operator) -> None:
        self.operator = operator
        self.calls: list[tuple[torch.Tensor, int]] = []

    def __call__(self, state, step):
        self.calls.append((state.clone(), step))
        return self.operator(state, step)


def make_operator(num_steps: int) -> SmoothOperator:
    torch.manual_seed(3)
    operator = SmoothOperator(num_steps)
    with torch.no_grad():
        operator.norm.weight.add_(0.3 * torch.randn_like(operator.norm.weight))
        operator.norm.bias.add_(0.3 * torch.randn_like(operator.norm.bias))
    return operator


def make_problem(num_steps: int, *, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(4)
    prior = FactorialGaussian(torch.rand(EVENT, generator=generator).to(dtype), torch.full(EVENT, 0.3, dtype=dtype))
    target = torch.rand(BATCH, *EVENT, generator=generator).to(dtype)
    return prior, InfusionSchedule(num_steps=num_steps, initial_rate=0.1, rate_increment=0.05), target


def weighted_log_density(operator, states: Iterable[tuple[torch.Tensor, int]], target, num_steps) -> torch.Tensor:
    """-Σ t/T log p⁽ᵗ⁾(x | z⁽ᵗ⁻¹⁾), averaged over the batch, for states that are constants; by torch.distributions."""
    total = torch.zeros((), dtype=target.dtype)
    for state, step in states:
        transition = operator(state, step)
        normal = distributions.Independent(distributions.Normal(transition.mean, transition.variance.sqrt()), 2)
        total = total - step / num_steps * normal.log_prob(target).sum() / len(target)
    return total


def gradients(loss: torch.Tensor, operator: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(operator.parameters())))


def test_losses_of_an_operator_that_ignores_its_input():
    # By hand: t/T [½ (x - μ)² / v + ½ log 2πv] per dimension, x - μ = 2 and v = 4: t/T × 6 × (½ + ½ log 8π).
    def operator(state, step):
        return FactorialGaussian(torch.full_like(state, 1.0), torch.full_like(state, 4.0))

    prior, schedule, target = make_problem(5)
    losses = list(
        denoising_losses(prior, operator, schedule, torch.full_like(target, 3.0), GeneratorNoise.from_seed(0))
    )
    cost = 6 * (0.5 + 0.5 * math.log(8 * math.pi))
    assert [loss.item() for loss in losses] == pytest.approx([cost * t / 5 for t in (1, 2, 3, 4, 5)], rel=1e-12)


def test_losses_are_the_weighted_log_densities_of_the_target():
    num_steps = 4
    prior, schedule, target = make_problem(num_steps)
    operator = make_operator(num_steps)
    recorder = Recorder(operator)
    losses = list(denoising_losses(prior, recorder, schedule, target, GeneratorNoise.from_seed(0)))
    assert [step for _, step in recorder.calls] == [1, 2, 3, 4]
    for loss, call in zip(losses, recorder.calls, strict=True):
        torch.testing.assert_close(loss, weighted_log_density(operator, [call], target, num_steps), rtol=1e-12, atol=0)


def test_gradient_is_the_sum_over_steps_with_constant_states():
    # Backward after every step = backward of the sum = the gradient at recorded states, by torch.distributions.
    num_steps = 4
    prior, schedule, target = make_problem(num_steps)
    operator = make_operator(num_steps)
    recorder = Recorder(operator)
    for loss in denoising_losses(prior, recorder, schedule, target, GeneratorNoise.from_seed(0)):
        loss.backward()
    stepwise = [parameter.grad for parameter in operator.parameters()]
    at_once = gradients(sum(denoising_losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0))), operator)
    known = gradients(weighted_log_density(operator, recorder.calls, target, num_steps), operator)
    for a, b, c in zip(stepwise, at_once, known, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12)


def test_gradient_agrees_with_finite_differences_at_constant_states():
    # Central differences of the weighted log density along 5 random directions in parameter space.
    num_steps = 3
    prior, schedule, target = make_problem(num_steps)
    operator = make_operator(num_steps)
    recorder = Recorder(operator)
    for loss in denoising_losses(prior, recorder, schedule, target, GeneratorNoise.from_seed(0)):
        loss.backward()
    assert_slopes(operator, lambda: weighted_log_density(operator, recorder.calls, target, num_steps))


def assert_slopes(operator: nn.Module, function: Callable[[], torch.Tensor]) -> None:
    """The parameters' gradients are the slopes of a function of them along 5 random directions, to rounding."""
    parameters = list(operator.parameters())
    generator, h = torch.Generator().manual_seed(0), 1e-5
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        values = []
        with torch.no_grad():
            for shift in (h, -2 * h, h):  # to +h, to -h, and back
                for parameter, d in zip(parameters, direction, strict=True):
                    parameter.add_(d, alpha=shift)
                values.append(function().item())
        slope = (values[0] - values[1]) / (2 * h)
        known = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
        assert known == pytest.approx(slope, rel=1e-6, abs=1e-7)


BOUND_LOSSES = [lower_bound_losses, reparametrised_lower_bound_losses]


@pytest.mark.parametrize("losses", BOUND_LOSSES)
def test_bound_losses_add_up_to_the_bound(losses):
    prior, schedule, target = make_problem(4)
    operator = make_operator(4)
    total = sum(losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0)))
    known = -log_weight(prior, operator, schedule, target, GeneratorNoise.from_seed(0)).total.mean()
    torch.testing.assert_close(total, known, rtol=1e-12, atol=0)


def test_lower_bound_s_gradient_agrees_with_finite_differences_at_constant_states():
    # The bound at the states of the unperturbed chain, with densities and mixtures by torch.distributions.
    prior, schedule, target = make_problem(3)
    operator = make_operator(3)
    chain = infusion_chain(prior, operator, schedule, target, GeneratorNoise.from_seed(0))
    states = [infused.draw.state for infused in chain if infused.draw is not None]
    for loss in lower_bound_losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0)):
        loss.backward()

    def bound() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for t in (1, 2, 3):
            transition = operator(states[t - 1], t)
            normal = distributions.Normal(transition.mean, transition.variance.sqrt())
            if t == 3:
                return -(total + normal.log_prob(target).sum()) / BATCH
            components = distributions.Normal(
                torch.stack([transition.mean, target], -1),
                torch.stack([normal.stddev, torch.full_like(target, schedule.target_variance**0.5)], -1),
            )
            rates = torch.tensor([1 - schedule.rates[t], schedule.rates[t]], dtype=torch.float64)
            mixture = distributions.MixtureSameFamily(
                distributions.Categorical(rates.expand(BATCH, *EVENT, 2)), components
            )
            total = total + (normal.log_prob(states[t]) - mixture.log_prob(states[t])).sum()
        raise AssertionError("the last step returns")

    assert_slopes(operator, bound)


def test_reparametrised_gradient_agrees_with_finite_differences_under_frozen_noise():
    # The states move with the parameters: the same noise is replayed for every value of them. A target component that
    # is narrow beside the differences would make these, not the gradient, inexact.
    prior, schedule, target = make_problem(3)
    schedule = replace(schedule, target_variance=0.05)
    operator = make_operator(3)
    (loss,) = reparametrised_lower_bound_losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0))
    loss.backward()
    assert_slopes(
        operator, lambda: -log_weight(prior, operator, schedule, target, GeneratorNoise.from_seed(0)).total.mean()
    )


def test_the_two_readings_of_the_bound_s_gradient_differ():
    prior, schedule, target = make_problem(3)
    operator = make_operator(3)
    constant, through = (
        gradients(sum(losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0))), operator)
        for losses in BOUND_LOSSES
    )
    assert any((a - b).abs().max() > 0.1 * b.abs().max() for a, b in zip(constant, through, strict=True))


def test_without_infusion_the_bound_s_gradient_is_that_of_the_reconstruction():
    # p = q at every step but the last, whose addend alone depends on the operator when the states are constants.
    prior, _, target = make_problem(3)
    schedule = InfusionSchedule(num_steps=3)
    operator = make_operator(3)
    chain = list(infusion_chain(prior, operator, schedule, target, GeneratorNoise.from_seed(0)))
    known = gradients(-chain[-1].transition.log_prob(target).mean(), operator)
    (loss,) = lower_bound_losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0))
    for mine, other in zip(gradients(loss, operator), known, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


class LiveTensors:
    """Counts the tensors that autograd holds for a backward pass, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hooks(self):
        counter = self

        class Held:
            def __init__(self, tensor) -> None:
                self.tensor = tensor
                counter.now += 1
                counter.peak = max(counter.peak, counter.now)

            def __del__(self) -> None:
                counter.now -= 1

        return torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)


def peak_of_saved_tensors(num_steps: int, objective: Objective, *, stepwise: bool) -> int:
    prior, schedule, target = make_problem(num_steps)
    operator, live = make_operator(num_steps), LiveTensors()
    losses = objective(prior, operator, schedule, target, GeneratorNoise.from_seed(0))
    with live.hooks():
        if stepwise:
            for loss in losses:
                loss.backward()
        else:
            sum(losses).backward()
    return live.peak


@pytest.mark.parametrize("objective", [denoising_losses, lower_bound_losses])
def test_gradient_memory_does_not_grow_with_the_number_of_steps(objective):
    peak = peak_of_saved_tensors(3, objective, stepwise=True)
    assert peak > 0
    assert peak_of_saved_tensors(12, objective, stepwise=True) == peak
    # The count is able to tell: with one backward at the end, all steps are held at once.
    assert peak_of_saved_tensors(12, objective, stepwise=False) > 10 * peak


# Two workers with half of the batch each against one with all of it.
NUM_STEPS = 4
NETWORKS = {"float64": 1e-10, "MLP in float32": 2e-5}
"""Networks, and to what part of a tensor's largest value they agree: rounding."""


class ShapesOnly:
    """Noise without values, of tensors that have none."""

    def normal_like(self, like):
        return torch.empty_like(like)

    def uniform_like(self, like):
        return torch.empty_like(like)

    def bernoulli_like(self, like, probability):
        return torch.empty_like(like, dtype=torch.bool)


@pytest.mark.parametrize("objective", OBJECTIVES.values())
@pytest.mark.parametrize("mask", ["value", "pixel"])
@pytest.mark.parametrize("network", [MLPOperator, ConvolutionalOperator])
def test_nothing_of_a_step_waits_for_a_value(objective, mask, network):
    # On a GPU, looking at a value means waiting for all that was asked of it. Tensors of the meta device have none:
    # whatever looks at one fails.
    shape = (3, 8, 8)
    with torch.device("meta"):
        operator = network(shape, 3, hidden_sizes=(8, 4))
        prior = FactorialGaussian(torch.empty(shape), torch.empty(shape))
        images = torch.empty(4, *shape, dtype=torch.uint8)
    schedule = InfusionSchedule(num_steps=3, initial_rate=0.1, rate_increment=0.1, mask=mask)
    target = dequantise(images, 256, ShapesOnly())
    for loss in objective(prior, operator, schedule, target, ShapesOnly()):
        loss.backward()
    assert all(parameter.grad.is_meta for parameter in operator.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def make_network(name: str) -> tuple[nn.Module, torch.dtype]:
    if name == "float64":
        return make_operator(NUM_STEPS), torch.float64
    torch.manual_seed(3)
    return MLPOperator(EVENT, NUM_STEPS, hidden_sizes=(16, 16), variance_floor=1e-2), torch.float32


def take_step(operator, parameters: list, objective: Objective, target, noise) -> dict[str, list[torch.Tensor]]:
    """One step of Adam with the objective's gradient; communication for the last step of the chain only."""
    prior, schedule, _ = make_problem(NUM_STEPS, dtype=target.dtype)
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    total = torch.zeros((), dtype=target.dtype)

    def call(state, step):
        if isinstance(operator, DistributedDataParallel):
            operator.require_backward_grad_sync = step == NUM_STEPS
        return operator(state, step)

    for loss in objective(prior, call, schedule, target, noise):
        loss.backward()
        total += loss.detach()
    optimiser.step()
    gradients = [parameter.grad for parameter in parameters]
    return {"gradients": gradients, "parameters": [p.detach() for p in parameters], "loss": [total]}


@pytest.fixture(scope="module")
def workers(run_workers):
    return run_workers(__file__)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_two_workers_take_the_step_that_one_takes(workers, name, objective):
    # Gradients over all T steps, and the parameters after a step of Adam, with the same noise on both sides.
    operator, dtype = make_network(name)
    before = [parameter.detach().clone() for parameter in operator.parameters()]
    noise = ConcatenatedNoise([GeneratorNoise.from_seed(rank) for rank in range(2)])
    target = make_problem(NUM_STEPS, dtype=dtype)[2]
    known = take_step(operator, list(operator.parameters()), OBJECTIVES[objective], target, noise)
    assert all(not torch.equal(p, then) for p, then in zip(operator.parameters(), before, strict=True))
    results = [worker[name][objective] for worker in workers]
    mean = (results[0]["loss"][0] + results[1]["loss"][0]) / 2
    torch.testing.assert_close(mean, known["loss"][0], rtol=1e-5, atol=0)
    for result in results:
        for gradient, expected in zip(result["gradients"], known["gradients"], strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=0, atol=NETWORKS[name] * scale)
        # Adam divides by the gradient's size: a parameter with none to speak of moves by its rounding.
        if name == "float64":
            for parameter, expected in zip(result["parameters"], known["parameters"], strict=True):
                torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-8)


def test_two_workers_end_with_the_same_bits(workers):
    for name in NETWORKS:
        for objective in OBJECTIVES:
            mine, other = (worker[name][objective]["parameters"] for worker in workers)
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def worker(rank: int) -> dict:
    """What one of two processes computes."""
    results: dict = {name: {} for name in NETWORKS}
    for name in NETWORKS:
        for objective, losses in OBJECTIVES.items():
            operator, dtype = make_network(name)
            target = make_problem(NUM_STEPS, dtype=dtype)[2].chunk(2)[rank]
            parallel = DistributedDataParallel(operator, broadcast_buffers=False)
            noise = GeneratorNoise.from_seed(rank)
            results[name][objective] = take_step(parallel, list(operator.parameters()), losses, target, noise)
    return results

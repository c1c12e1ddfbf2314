import math
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import distributions, nn
from torch.nn.parallel import DistributedDataParallel

from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import GeneratorNoise
from infusion_core.normalization import StepBatchNorm
from infusion_core.objective import denoising_losses
from infusion_core.operator import MLPOperator, TransitionOperator
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


class ConcatenatedNoise:
    """What several workers draw, each for an equal share of the batch, as one process's noise."""

    def __init__(self, parts: list[GeneratorNoise]) -> None:
        self.parts = parts

    def normal_like(self, like):
        shares = like.chunk(len(self.parts))
        return torch.cat([part.normal_like(share) for part, share in zip(self.parts, shares, strict=True)])

    def uniform_like(self, like):
        shares = like.chunk(len(self.parts))
        return torch.cat([part.uniform_like(share) for part, share in zip(self.parts, shares, strict=True)])

    def bernoulli_like(self, like, probability):
        shares = like.chunk(len(self.parts))
        return torch.cat(
            [part.bernoulli_like(share, probability) for part, share in zip(self.parts, shares, strict=True)]
        )


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
    parameters = list(operator.parameters())
    generator, h = torch.Generator().manual_seed(0), 1e-5
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        values = []
        with torch.no_grad():
            for shift in (h, -2 * h, h):  # to +h, to -h, and back
                for parameter, d in zip(parameters, direction, strict=True):
                    parameter.add_(d, alpha=shift)
                values.append(weighted_log_density(operator, recorder.calls, target, num_steps).item())
        slope = (values[0] - values[1]) / (2 * h)
        known = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
        assert known == pytest.approx(slope, rel=1e-7, abs=1e-7)


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


def peak_of_saved_tensors(num_steps: int, *, stepwise: bool) -> int:
    prior, schedule, target = make_problem(num_steps)
    operator, live = make_operator(num_steps), LiveTensors()
    losses = denoising_losses(prior, operator, schedule, target, GeneratorNoise.from_seed(0))
    with live.hooks():
        if stepwise:
            for loss in losses:
                loss.backward()
        else:
            sum(losses).backward()
    return live.peak


def test_gradient_memory_does_not_grow_with_the_number_of_steps():
    peak = peak_of_saved_tensors(3, stepwise=True)
    assert peak > 0
    assert peak_of_saved_tensors(12, stepwise=True) == peak
    # The count is able to tell: with one backward at the end, all steps are held at once.
    assert peak_of_saved_tensors(12, stepwise=False) > 10 * peak


# Two workers with half of the batch each against one with all of it.
NUM_STEPS = 4
NETWORKS = {"float64": 1e-10, "MLP in float32": 2e-5}
"""Networks, and to what part of a tensor's largest value they agree: rounding."""


def make_network(name: str) -> tuple[nn.Module, torch.dtype]:
    if name == "float64":
        return make_operator(NUM_STEPS), torch.float64
    torch.manual_seed(3)
    return MLPOperator(EVENT, NUM_STEPS, hidden_sizes=(16, 16), variance_floor=1e-2), torch.float32


def take_step(operator, parameters: list, target, noise, *, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """One step of Adam with the objective's gradient; communication at the last backward only."""
    prior, schedule, _ = make_problem(NUM_STEPS, dtype=dtype)
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    losses = denoising_losses(prior, operator, schedule, target, noise)
    total = torch.zeros((), dtype=dtype)
    for step in range(1, NUM_STEPS + 1):
        if isinstance(operator, DistributedDataParallel):
            operator.require_backward_grad_sync = step == NUM_STEPS
        loss = next(losses)
        loss.backward()
        total += loss.detach()
    assert next(losses, None) is None
    optimiser.step()
    gradients = [parameter.grad for parameter in parameters]
    return {"gradients": gradients, "parameters": [p.detach() for p in parameters], "loss": [total]}


@pytest.fixture(scope="module")
def workers(run_workers):
    return run_workers(__file__)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_workers_take_the_step_that_one_takes(workers, name):
    # Gradients over all T steps, and the parameters after a step of Adam, with the same noise on both sides.
    operator, dtype = make_network(name)
    before = [parameter.detach().clone() for parameter in operator.parameters()]
    noise = ConcatenatedNoise([GeneratorNoise.from_seed(rank) for rank in range(2)])
    target = make_problem(NUM_STEPS, dtype=dtype)[2]
    known = take_step(operator, list(operator.parameters()), target, noise, dtype=dtype)
    assert all(not torch.equal(p, then) for p, then in zip(operator.parameters(), before, strict=True))
    torch.testing.assert_close(
        (workers[0][name]["loss"][0] + workers[1][name]["loss"][0]) / 2, known["loss"][0], rtol=1e-5, atol=0
    )
    for rank in range(2):
        for result, expected in zip(workers[rank][name]["gradients"], known["gradients"], strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(result, expected, rtol=0, atol=NETWORKS[name] * scale)
    if (
        name == "float64"
    ):  # Adam divides by the gradient's size: a parameter with none to speak of moves by its rounding
        for rank in range(2):
            for result, expected in zip(workers[rank][name]["parameters"], known["parameters"], strict=True):
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-8)


def test_two_workers_end_with_the_same_bits(workers):
    for name in NETWORKS:
        for mine, other in zip(workers[0][name]["parameters"], workers[1][name]["parameters"], strict=True):
            assert torch.equal(mine, other)


def worker(rank: int, folder: Path) -> dict:
    """What one of two processes computes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in NETWORKS:
        operator, dtype = make_network(name)
        target = make_problem(NUM_STEPS, dtype=dtype)[2].chunk(2)[rank]
        parallel = DistributedDataParallel(operator)
        noise = GeneratorNoise.from_seed(rank)
        results[name] = take_step(parallel, list(operator.parameters()), target, noise, dtype=dtype)
    dist.destroy_process_group()
    return results


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.save(worker(rank, folder), folder / f"{rank}.pt")

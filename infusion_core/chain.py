r"""The two Markov chains of the paper.

The *sampling chain* (Section 2.2) is the model: z⁽⁰⁾ ~ p⁽⁰⁾, then z⁽ᵗ⁾ ~ p⁽ᵗ⁾(· | z⁽ᵗ⁻¹⁾) for t = 1, …, T.

The *infusion chain* (Section 2.3.1) leads to a target x. Each dimension of each of its states is drawn from a mixture,

.. math:: q^{(t)}_i = (1 - \alpha^{(t)})\, p^{(t)}_i + \alpha^{(t)}\, \delta_{x_i},

from the model with probability 1 - α⁽ᵗ⁾ and from a narrow Gaussian around the target's value otherwise. Its last
transition, p⁽ᵀ⁾(· | z⁽ᵀ⁻¹⁾), is where the target itself is scored: nothing is drawn from it.

Both chains are generators, one step an item: what is done with a step (a gradient, a bound, a picture) is the
caller's, and nothing is kept for longer than the caller keeps it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import Noise
from infusion_core.schedule import InfusionSchedule

Operator = Callable[[Tensor, int], FactorialGaussian]
"""A `TransitionOperator`, or anything that is called as one (a data-parallel wrapper of it, say)."""


@dataclass(frozen=True)
class InfusionStep:
    """Step t of an infusion chain, 0 ≤ t ≤ T.

    Attributes:
        step: t.
        transition: p⁽ᵗ⁾(· | z⁽ᵗ⁻¹⁾), or the prior p⁽⁰⁾ at t = 0, of shape `(B, *event)`; it carries gradients.
        rate: α⁽ᵗ⁾.
        draw: z⁽ᵗ⁾ and what it was picked from; `None` at t = T, where nothing is drawn.
    """

    step: int
    transition: FactorialGaussian
    rate: float
    draw: "InfusedDraw | None"


@dataclass(frozen=True)
class InfusedDraw:
    """A draw from q⁽ᵗ⁾, with a draw from each of the mixture's two components; each of shape `(B, *event)`.

    Attributes:
        state: z⁽ᵗ⁾, each dimension of which is that of one of the components.
        from_model: drawn from p⁽ᵗ⁾.
        from_target: drawn from δ_x.
    """

    state: Tensor
    from_model: Tensor
    from_target: Tensor


def infusion_chain(
    prior: FactorialGaussian,
    operator: Operator,
    schedule: InfusionSchedule,
    target: Tensor,
    noise: Noise,
    *,
    reparametrised: bool = False,
) -> Iterator[InfusionStep]:
    """Runs the infusion chain towards `target`, of shape `(B, *event)`; yields its steps t = 0, …, T.

    By default the states are constants: a gradient taken of one step's transition reaches that step only, and its graph
    can be freed before the next step is computed. With `reparametrised`, a state is a differentiable function of the
    transition that it was drawn from, and gradients run through the whole chain.
    """
    transition = prior.expand(len(target))
    for step, rate in enumerate(schedule.rates):
        draw = infuse(transition if reparametrised else transition.detach(), target, rate, schedule, noise)
        yield InfusionStep(step, transition, rate, draw)
        transition = operator(draw.state, step + 1)
    yield InfusionStep(schedule.num_steps, transition, 0.0, None)


def infuse(
    transition: FactorialGaussian, target: Tensor, rate: float, schedule: InfusionSchedule, noise: Noise
) -> InfusedDraw:
    """Draws z⁽ᵗ⁾ ~ q⁽ᵗ⁾(· | z⁽ᵗ⁻¹⁾, x) at the infusion rate `rate`, for a target of shape `(B, *event)`.

    One Gaussian draw a dimension serves both components of the mixture.
    """
    picked = None
    if rate > 0:
        picked = noise.bernoulli_like(target[:, :1] if schedule.mask == "pixel" else target, rate)
    normal = noise.normal_like(target)
    from_model = torch.addcmul(transition.mean, transition.variance.sqrt(), normal)
    from_target = torch.add(target, normal, alpha=math.sqrt(schedule.target_variance))
    state = from_model if picked is None else torch.where(picked, from_target, from_model)
    return InfusedDraw(state, from_model, from_target)


@dataclass(frozen=True)
class SamplingStep:
    """Step t of a sampling chain.

    Attributes:
        step: t, from 0.
        transition: p⁽ᵗ⁾(· | z⁽ᵗ⁻¹⁾), or the prior p⁽⁰⁾ at t = 0; its mean is what the paper draws its figures of.
        state: z⁽ᵗ⁾ ~ p⁽ᵗ⁾, of shape `(B, *event)`.
    """

    step: int
    transition: FactorialGaussian
    state: Tensor


def sampling_chain(
    prior: FactorialGaussian,
    operator: Operator,
    num_steps: int,
    num_samples: int,
    noise: Noise,
    *,
    clamp: Callable[[Tensor], Tensor] = lambda state: state,
) -> Iterator[SamplingStep]:
    """Runs the model from noise to `num_samples` samples; yields the steps t = 0, …, `num_steps`.

    Args:
        prior: p⁽⁰⁾.
        operator: p⁽ᵗ⁾.
        num_steps: length of the chain, which may exceed the number of steps that the operator was trained for.
        num_samples: how many chains.
        noise: source of the chain's randomness.
        clamp: applied to every state, `(B, *event)`, before it is used (inpainting holds what is known of an image).
    """
    transition = prior.expand(num_samples)
    state = clamp(transition.sample(noise))
    yield SamplingStep(0, transition, state)
    for step in range(1, num_steps + 1):
        transition = operator(state, step)
        state = clamp(transition.sample(noise))
        yield SamplingStep(step, transition, state)


@dataclass(frozen=True)
class Trajectory:
    """A whole sampling chain.

    Attributes:
        states: z⁽⁰⁾ … z⁽ᵀ⁾, shape `(T + 1, B, *event)`.
        means: means of p⁽⁰⁾ … p⁽ᵀ⁾, same shape.
    """

    states: Tensor
    means: Tensor


def sampling_trajectory(
    prior: FactorialGaussian, operator: Operator, num_steps: int, num_samples: int, noise: Noise
) -> Trajectory:
    """Runs `sampling_chain` and returns all states and means; memory grows with `num_steps`."""
    steps = list(sampling_chain(prior, operator, num_steps, num_samples, noise))
    return Trajectory(
        torch.stack([step.state for step in steps]), torch.stack([step.transition.mean for step in steps])
    )

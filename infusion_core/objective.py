r"""What is minimised in training (Sections 2.3.2 and 2.4.1).

The *denoising* objective asks that every state of the infusion chain be denoised into the target, later ones with more
weight:

.. math:: \sum_{t=1}^{T} \eta^{(t)} \log p^{(t)}(x \mid \tilde z^{(t-1)}), \qquad \eta^{(t)} = t / T.

The *lower bound* itself, E[ℓ] of Eq. 3, is the other. How its gradient treats the states, which are drawn from
distributions that depend on the operator, is a choice: they are held constant, as the denoising objective has them, or
are reparametrised, z⁽ᵗ⁾ = μ⁽ᵗ⁾ + σ⁽ᵗ⁾ ε where the model's component was picked, so that the gradient runs through the
chain. Which component is picked does not depend on the operator: the latter is an unbiased gradient of the bound.

Where states are constants the gradient is a sum over steps, and each step's graph can be freed before the next step is
computed: memory does not grow with T. Through the chain, it does.

All objectives are called alike and yield their negative in addends, in nats, averaged over the batch: call `backward`
on each before asking for the next; the gradients add up to the objective's.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from infusion_core.bound import sampled_addend
from infusion_core.chain import Operator, infusion_chain
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import Noise
from infusion_core.schedule import InfusionSchedule

Objective = Callable[[FactorialGaussian, Operator, InfusionSchedule, Tensor, Noise], Iterator[Tensor]]
"""Called with p⁽⁰⁾, p⁽ᵗ⁾ in training mode, the infusion rates, x of shape `(B, *event)`, and the chain's randomness."""


def denoising_losses(
    prior: FactorialGaussian, operator: Operator, schedule: InfusionSchedule, target: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Yields the T addends of the negative denoising objective (Section 2.3.2)."""
    for infused in infusion_chain(prior, operator, schedule, target, noise):
        if infused.step > 0:
            weight = infused.step / schedule.num_steps
            yield -weight * infused.transition.log_prob(target).mean()


def lower_bound_losses(
    prior: FactorialGaussian, operator: Operator, schedule: InfusionSchedule, target: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Yields the negative lower bound (Eq. 3) in addends, at most T, whose gradients hold the states constant."""
    constant = torch.zeros((), device=target.device)
    for infused in infusion_chain(prior, operator, schedule, target, noise):
        loss = constant - sampled_addend(infused, schedule, target).mean()
        # The prior's addend has no gradient, nor has one without infusion, where p and q are the same.
        if loss.requires_grad:
            yield loss
            constant = torch.zeros_like(constant)
        else:
            constant = loss


def reparametrised_lower_bound_losses(
    prior: FactorialGaussian, operator: Operator, schedule: InfusionSchedule, target: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Yields the negative lower bound (Eq. 3) whole; its gradient runs through the states."""
    chain = infusion_chain(prior, operator, schedule, target, noise, reparametrised=True)
    yield -torch.stack([sampled_addend(infused, schedule, target) for infused in chain]).sum(0).mean()


ObjectiveName = Literal["denoising", "lower_bound", "reparametrised_lower_bound"]

OBJECTIVES: Mapping[ObjectiveName, Objective] = MappingProxyType(
    {
        "denoising": denoising_losses,
        "lower_bound": lower_bound_losses,
        "reparametrised_lower_bound": reparametrised_lower_bound_losses,
    }
)

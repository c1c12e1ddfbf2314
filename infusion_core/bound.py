r"""The variational lower bound on the log-likelihood (Eq. 3).

With z̃ = (z⁽⁰⁾, …, z⁽ᵀ⁻¹⁾) drawn from the infusion chain towards x,

.. math:: \log p(x) \ge \mathbb{E}_{q(\tilde z \mid x)}[\ell], \qquad
   \ell = \log p(\tilde z, x) - \log q(\tilde z \mid x)
        = \sum_{t=0}^{T-1} \log\frac{p^{(t)}(z^{(t)})}{q^{(t)}(z^{(t)})} + \log p^{(T)}(x \mid z^{(T-1)}).

ℓ is the log weight of one chain: exp ℓ averages to p(x).

The expectation can be taken in part exactly. Given z⁽ᵗ⁻¹⁾ and the Gaussian draw, z⁽ᵗ⁾ has only two values a dimension
(or a pixel), according to which component of the mixture was picked, with the probabilities 1 - α⁽ᵗ⁾ and α⁽ᵗ⁾:
averaging the addend over both (`bound_estimates`) has the same mean as picking one, and each addend has less
variance; their total has, too, unless they were about to cancel, as when q is nearly the posterior of the chain.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infusion_core.chain import InfusionStep, Operator, infusion_chain
from infusion_core.gaussian import LOG_2_PI, FactorialGaussian
from infusion_core.noise import Noise
from infusion_core.schedule import InfusionSchedule


@dataclass(frozen=True)
class LogWeight:
    """The log weight ℓ of one infusion chain per example, as its addends; each of shape `(B,)`, in nats.

    Attributes:
        prior: log p⁽⁰⁾(z⁽⁰⁾) - log q⁽⁰⁾(z⁽⁰⁾ | x).
        transitions: the same for t = 1, …, T-1, summed.
        reconstruction: log p⁽ᵀ⁾(x | z⁽ᵀ⁻¹⁾).
    """

    prior: Tensor
    transitions: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """ℓ, shape `(B,)`; its expectation is the lower bound."""
        return self.prior + self.transitions + self.reconstruction


def log_weight(
    prior: FactorialGaussian,
    operator: Operator,
    schedule: InfusionSchedule,
    target: Tensor,
    noise: Noise,
    *,
    output_variance: float | None = None,
) -> LogWeight:
    """Draws one infusion chain per example and returns its log weight.

    Args:
        prior: p⁽⁰⁾.
        operator: p⁽ᵗ⁾, in evaluation mode (in training mode an example's weight depends on its batch).
        schedule: infusion rates.
        target: x, shape `(B, *event)`.
        noise: source of the chain's randomness.
        output_variance: variance of every dimension of the last transition instead of the operator's own: the isotropic
            observation model of Table 2.
    """
    chain = infusion_chain(prior, operator, schedule, target, noise)
    (weight,) = _sums(chain, schedule, target, (sampled_addend,), output_variance)
    return weight


def bound_estimates(
    prior: FactorialGaussian,
    operator: Operator,
    schedule: InfusionSchedule,
    target: Tensor,
    noise: Noise,
    *,
    output_variance: float | None = None,
) -> tuple[LogWeight, LogWeight]:
    """Draws chains as `log_weight` does, and estimates the lower bound twice, the second time with less variance.

    Returns:
        The log weights; and addends whose expectations are the same, each with less variance. These are means of log
        weights, not log weights: the exponential of their total is not an estimate of p(x).
    """
    chain = infusion_chain(prior, operator, schedule, target, noise)
    weight, averaged = _sums(chain, schedule, target, (sampled_addend, component_averaged_addend), output_variance)
    return weight, averaged


Addend = Callable[[InfusionStep, InfusionSchedule, Tensor], Tensor]


def _sums(
    chain: Iterable[InfusionStep],
    schedule: InfusionSchedule,
    target: Tensor,
    addends: Sequence[Addend],
    output_variance: float | None,
) -> Iterator[LogWeight]:
    """Yields the sums over the chain of each of several addends."""
    steps = []
    for infused in chain:
        if infused.draw is None and output_variance is not None:
            mean = infused.transition.mean
            infused = replace(infused, transition=FactorialGaussian(mean, mean.new_tensor(output_variance)))
        steps.append([addend(infused, schedule, target) for addend in addends])
    for first, *others, last in zip(*steps, strict=True):
        transitions = torch.stack(others).sum(0) if others else torch.zeros_like(first)
        yield LogWeight(first, transitions, last)


def sampled_addend(infused: InfusionStep, schedule: InfusionSchedule, target: Tensor) -> Tensor:
    """Returns what a step of the chain adds to ℓ, shape `(B,)`, in nats."""
    if infused.draw is None:
        return infused.transition.log_prob(target)
    return log_ratio(infused.transition, infused.draw.state, target, infused.rate, schedule).flatten(1).sum(1)


def component_averaged_addend(infused: InfusionStep, schedule: InfusionSchedule, target: Tensor) -> Tensor:
    """Returns the expectation of `sampled_addend` over which component was picked, shape `(B,)`, in nats."""
    if infused.draw is None:
        return infused.transition.log_prob(target)
    from_model, from_target = (
        log_ratio(infused.transition, draw, target, infused.rate, schedule).flatten(1).sum(1)
        for draw in (infused.draw.from_model, infused.draw.from_target)
    )
    return (1 - infused.rate) * from_model + infused.rate * from_target


def log_ratio(
    transition: FactorialGaussian, state: Tensor, target: Tensor, rate: float, schedule: InfusionSchedule
) -> Tensor:
    r"""Returns log p(z) - log q(z) of all that is infused or not at once, in nats.

    With q = (1 - α) p + α δ this is -log[(1 - α) + α δ(z) / p(z)], which neither overflows nor cancels where the two
    densities differ by many orders of magnitude.

    Returns:
        The ratio of every value, shape `(B, *event)`; where the schedule's mask is "pixel", p, q and δ are densities of
        all of a pixel's channels, and dimension 1 of the ratio has one element.
    """
    if rate == 0:
        return torch.zeros_like(state[:, :1] if schedule.mask == "pixel" else state)
    target_variance = schedule.target_variance
    deviation = (state - target).square() / target_variance
    log_target = -0.5 * (deviation + math.log(target_variance) + LOG_2_PI)
    log_odds = log_target - transition.log_density(state)
    if schedule.mask == "pixel":
        log_odds = log_odds.sum(1, keepdim=True)
    log_odds = log_odds + math.log(rate)
    if rate == 1:
        return -log_odds
    return -torch.logaddexp(log_odds, torch.full_like(log_odds, math.log1p(-rate)))

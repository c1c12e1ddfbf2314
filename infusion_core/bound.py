r"""The variational lower bound on the log-likelihood (Eq. 3).

With z̃ = (z⁽⁰⁾, …, z⁽ᵀ⁻¹⁾) drawn from the infusion chain towards x,

.. math:: \log p(x) \ge \mathbb{E}_{q(\tilde z \mid x)}[\ell], \qquad
   \ell = \log p(\tilde z, x) - \log q(\tilde z \mid x)
        = \sum_{t=0}^{T-1} \log\frac{p^{(t)}(z^{(t)})}{q^{(t)}(z^{(t)})} + \log p^{(T)}(x \mid z^{(T-1)}).

ℓ is the log weight of one chain: exp ℓ averages to p(x).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infusion_core.chain import Operator, infusion_chain
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
    prior: FactorialGaussian, operator: Operator, schedule: InfusionSchedule, target: Tensor, noise: Noise
) -> LogWeight:
    """Draws one infusion chain per example and returns its log weight.

    Args:
        prior: p⁽⁰⁾.
        operator: p⁽ᵗ⁾, in evaluation mode (in training mode an example's weight depends on its batch).
        schedule: infusion rates.
        target: x, shape `(B, *event)`.
        noise: source of the chain's randomness.
    """
    ratios = []
    reconstruction = None
    for infused in infusion_chain(prior, operator, schedule, target, noise):
        if infused.state is None:
            reconstruction = infused.transition.log_prob(target)
        else:
            ratio = log_ratio(infused.transition, infused.state, target, infused.rate, schedule.target_variance)
            ratios.append(ratio.flatten(1).sum(1))
    assert reconstruction is not None, "the chain ends with a step that draws nothing"
    transitions = torch.stack(ratios[1:]).sum(0) if len(ratios) > 1 else torch.zeros_like(ratios[0])
    return LogWeight(ratios[0], transitions, reconstruction)


def log_ratio(
    transition: FactorialGaussian, state: Tensor, target: Tensor, rate: float, target_variance: float
) -> Tensor:
    r"""Returns log p(z) - log q(z) of every dimension, shape `(B, *event)`.

    With q = (1 - α) p + α δ this is -log[(1 - α) + α δ(z) / p(z)], which neither overflows nor cancels where the two
    densities differ by many orders of magnitude.
    """
    if rate == 0:
        return torch.zeros_like(state)
    deviation = (state - target).square() / target_variance
    log_target = -0.5 * (deviation + math.log(target_variance) + LOG_2_PI)
    log_odds = log_target - transition.log_density(state) + math.log(rate)
    if rate == 1:
        return -log_odds
    return -torch.logaddexp(log_odds, torch.full_like(log_odds, math.log1p(-rate)))

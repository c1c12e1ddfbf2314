r"""The denoising objective (Section 2.3.2).

Every state of the infusion chain is to be denoised into the target, later ones with more weight:

.. math:: \sum_{t=1}^{T} \eta^{(t)} \log p^{(t)}(x \mid \tilde z^{(t-1)}), \qquad \eta^{(t)} = t / T.

The states are held constant, so that the gradient is a sum over steps, and each step's graph can be freed before the
next step is computed: memory does not grow with T.
"""

from collections.abc import Iterator

from torch import Tensor

from infusion_core.chain import Operator, infusion_chain
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import Noise
from infusion_core.schedule import InfusionSchedule


def denoising_losses(
    prior: FactorialGaussian, operator: Operator, schedule: InfusionSchedule, target: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Yields the T addends of the negative objective, in nats, averaged over the batch.

    Call `backward` on each before asking for the next; the gradients add up to the objective's.

    Args:
        prior: p⁽⁰⁾.
        operator: p⁽ᵗ⁾, in training mode.
        schedule: infusion rates.
        target: x, shape `(B, *event)`.
        noise: source of the chain's randomness.
    """
    for infused in infusion_chain(prior, operator, schedule, target, noise):
        if infused.step > 0:
            weight = infused.step / schedule.num_steps
            yield -weight * infused.transition.log_prob(target).mean()

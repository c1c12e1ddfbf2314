r"""How much of the target is infused at each step (Section 2.3.1).

The infusion rate α⁽ᵗ⁾ is the probability that a dimension of the state z⁽ᵗ⁾ is taken from the target instead of from
the model. It starts at α⁽⁰⁾ and grows by ω a step,

.. math:: \alpha^{(t)} = \alpha^{(0)} + t\,\omega, \qquad t = 0, \dots, T-1,

so that ω = 0 is a constant rate. The last state, z⁽ᵀ⁾, is not infused: it is the sample. This is the paper's
α⁽ᵗ⁾ = α⁽ᵗ⁻¹⁾ + ω; the authors' code uses α⁽⁰⁾ for z⁽⁰⁾ and again for z⁽¹⁾, which is not followed here.
"""

from dataclasses import dataclass
from typing import Literal

from infusion_core.errors import InfusionError

InfusionMask = Literal["value", "pixel"]
"""What is infused or not as a whole: each value on its own, or all channels of a pixel, as the authors' code has it."""


@dataclass(frozen=True, kw_only=True)
class InfusionSchedule:
    """The infusion rates of a chain of `num_steps` steps, and what is infused at once and how wide.

    Attributes:
        num_steps: T, the number of transitions.
        initial_rate: α⁽⁰⁾, in [0, 1].
        rate_increment: ω, the growth of the rate per step.
        target_variance: variance of the target component, the narrow Gaussian δ_x around the target.
        mask: see `InfusionMask`; with "pixel", the states' dimension 1 is that of the channels.

    Raises:
        InfusionError: there is no step, a rate leaves [0, 1] (the message names the first step at which it does), or
            the target component has no width.
    """

    num_steps: int
    initial_rate: float = 0.0
    rate_increment: float = 0.0
    target_variance: float = 1e-4
    mask: InfusionMask = "value"

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InfusionError(f"a chain has at least one step, not num_steps = {self.num_steps}")
        if not self.target_variance > 0:
            raise InfusionError(f"the target component needs a positive variance, not {self.target_variance}")
        for t, rate in enumerate(self.rates):
            if not 0 <= rate <= 1:
                raise InfusionError(
                    f"the infusion rate leaves [0, 1] at step {t} of {self.num_steps}: "
                    f"{self.initial_rate:g} + {t} × {self.rate_increment:g} = {rate:g}; "
                    "choose a smaller initial rate, a smaller increment or fewer steps"
                )

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates α⁽⁰⁾ … α⁽ᵀ⁻¹⁾ of the states z⁽⁰⁾ … z⁽ᵀ⁻¹⁾."""
        # Rounding in t × ω must not push a schedule that ends exactly at 1 past it.
        return tuple(round(self.initial_rate + t * self.rate_increment, 12) for t in range(self.num_steps))

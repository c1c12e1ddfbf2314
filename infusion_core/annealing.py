r"""Annealed importance sampling (Neal 2001) of the log-likelihood, which the paper leaves for future work.

An infusion chain is a function of the noise u that it is drawn with: Gaussian draws, and masks of what is infused. So
is its log weight, and under the noise's own law, :math:`\mathbb{E}[e^{\ell(u)}] = p(x)`. Between this law and the
posterior of the noise given x lie the distributions

.. math:: \pi_\beta(u) \propto \mathrm{law}(u)\, e^{\beta \ell(u)}, \qquad 0 \le \beta \le 1.

From u₀, drawn at β₀ = 0, the noise is moved by Markov transitions that leave π at the inverse temperatures
0 < β₁ < … < βₙ = 1 invariant, one after another, and

.. math:: \log w = \sum_{j=1}^{n} (\beta_j - \beta_{j-1})\, \ell(u_{j-1})

is the annealed log weight: w averages to p(x) as exp ℓ does, however many temperatures there are, and varies the less
the more there are. For n = 1 it is exp ℓ. It costs n infusion chains.

A transition perturbs the noise such that its law is left invariant, and accepts with probability
min(1, exp β(ℓ' - ℓ)): Gaussian draws move to √(1 - s²) u + s ξ, ξ ~ N(0, I) (preconditioned Crank-Nicolson), and each
of the others is drawn anew with probability s². The step size s is drawn for every transition; were it adapted to what
was accepted, w would be biased.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infusion_core.bound import log_weight
from infusion_core.chain import Operator
from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import Noise
from infusion_core.schedule import InfusionSchedule

# Step sizes are log-uniform between these. Which is best depends on the posterior and on β: small where many dimensions
# are certain.
LEAST_STEP, GREATEST_STEP = 0.05, 1.0


@dataclass(frozen=True)
class AnnealedLogWeight:
    """The annealed log weight of one chain per example.

    Attributes:
        total: log w, float64 of shape `(B,)`, in nats; its expectation is a lower bound on log p(x).
        acceptance_rate: share of the transitions that were accepted, shape `(B,)`; NaN for a single temperature.
    """

    total: Tensor
    acceptance_rate: Tensor


def inverse_temperatures(count: int) -> tuple[float, ...]:
    """Returns β₁ … βₙ as (j/n)², for n = `count`: denser towards 0, where log weights vary most.

    Raises:
        InfusionError: `count` is less than one.
    """
    if count < 1:
        raise InfusionError(f"annealing needs at least one temperature, not {count}")
    return tuple((j / count) ** 2 for j in range(1, count + 1))


@torch.no_grad()
def annealed_log_weight(
    prior: FactorialGaussian,
    operator: Operator,
    schedule: InfusionSchedule,
    target: Tensor,
    noise: Noise,
    temperatures: Sequence[float],
    *,
    output_variance: float | None = None,
) -> AnnealedLogWeight:
    """Draws one annealed chain per example and returns its log weight.

    Memory grows with the length of the chain: the noise of two chains per example is kept.

    Args:
        prior: p⁽⁰⁾.
        operator: p⁽ᵗ⁾, in evaluation mode.
        schedule: infusion rates.
        target: x, shape `(B, *event)`.
        noise: source of all randomness.
        temperatures: β₁ … βₙ, inverse temperatures that increase from above 0 to 1; see `inverse_temperatures`.
        output_variance: as of `log_weight`.

    Raises:
        InfusionError: the temperatures do not increase from above 0 to 1.
    """
    if not all(low < high for low, high in itertools.pairwise([0.0, *temperatures])) or [*temperatures][-1:] != [1]:
        raise InfusionError(f"inverse temperatures must increase from above 0 to exactly 1, not {_ends(temperatures)}")

    def log_weight_under(chain_noise: Noise) -> Tensor:
        return log_weight(prior, operator, schedule, target, chain_noise, output_variance=output_variance).total

    recording = _RecordingNoise(noise)
    current = log_weight_under(recording)
    draws = recording.draws
    total = temperatures[0] * current.double()
    accepted = torch.zeros_like(total)
    for inverse_temperature, following in itertools.pairwise(temperatures):
        step = LEAST_STEP * (GREATEST_STEP / LEAST_STEP) ** noise.uniform_like(current)
        proposal = [draw.perturbed(step, noise) for draw in draws]
        proposed = log_weight_under(_ReplayedNoise(proposal))
        accept = noise.uniform_like(current).log() < inverse_temperature * (proposed - current)
        draws = [new.where(accept, old) for new, old in zip(proposal, draws, strict=True)]
        current = torch.where(accept, proposed, current)
        total += (following - inverse_temperature) * current.double()
        accepted += accept
    return AnnealedLogWeight(total, accepted / (len(temperatures) - 1))


def _ends(temperatures: Sequence[float]) -> str:
    return f"{len(temperatures)} from {temperatures[0]:g} to {temperatures[-1]:g}" if temperatures else "none"


@dataclass(frozen=True)
class _Draw:
    """What a source of noise has handed out at one request.

    Attributes:
        values: of shape `(B, *event)`.
        redraw: returns the same request's answer from the source, anew.
        is_normal: whether the values are standard Gaussian.
    """

    values: Tensor
    redraw: Callable[[], Tensor]
    is_normal: bool

    def perturbed(self, step: Tensor, noise: Noise) -> "_Draw":
        """Returns a draw that is related to this one, of the same law; `step` is s, in [0, 1], of shape `(B,)`."""
        step = _per_example(step, self.values)
        fresh = self.redraw()
        if self.is_normal:
            values = (1 - step.square()).sqrt() * self.values + step * fresh
        else:
            chance = noise.uniform_like(step.new_empty(self.values.shape))
            values = torch.where(chance < step.square(), fresh, self.values)
        return replace(self, values=values)

    def where(self, chosen: Tensor, other: "_Draw") -> "_Draw":
        """Returns the draw with this one's values for the examples that are chosen, `(B,)`, else the other's."""
        return replace(self, values=torch.where(_per_example(chosen, self.values), self.values, other.values))


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


class _RecordingNoise:
    """A source of noise that remembers what it has handed out."""

    def __init__(self, source: Noise) -> None:
        self.source = source
        self.draws: list[_Draw] = []

    def normal_like(self, like: Tensor) -> Tensor:
        return self._record(lambda: self.source.normal_like(like), is_normal=True)

    def uniform_like(self, like: Tensor) -> Tensor:
        return self._record(lambda: self.source.uniform_like(like), is_normal=False)

    def bernoulli_like(self, like: Tensor, probability: float) -> Tensor:
        return self._record(lambda: self.source.bernoulli_like(like, probability), is_normal=False)

    def _record(self, draw: Callable[[], Tensor], *, is_normal: bool) -> Tensor:
        values = draw()
        self.draws.append(_Draw(values, draw, is_normal))
        return values


class _ReplayedNoise:
    """Noise that hands out given draws, in their order."""

    def __init__(self, draws: Sequence[_Draw]) -> None:
        self.draws = iter(draws)

    def normal_like(self, like: Tensor) -> Tensor:
        return self._replay(like)

    def uniform_like(self, like: Tensor) -> Tensor:
        return self._replay(like)

    def bernoulli_like(self, like: Tensor, probability: float) -> Tensor:  # noqa: ARG002
        return self._replay(like)

    def _replay(self, like: Tensor) -> Tensor:
        values = next(self.draws).values
        assert values.shape == like.shape
        return values

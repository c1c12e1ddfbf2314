r"""Gaussians that factorise over the dimensions of a state.

The prior p⁽⁰⁾ and every transition p⁽ᵗ⁾(z⁽ᵗ⁾ | z⁽ᵗ⁻¹⁾) of the chain are of this family:

.. math:: \log \mathcal{N}(x; \mu, v) = -\tfrac12 \sum_i \Big[ \log 2\pi v_i + (x_i - \mu_i)^2 / v_i \Big]
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from infusion_core.errors import InfusionError
from infusion_core.noise import Noise

LOG_2_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class FactorialGaussian:
    """A Gaussian with independent dimensions.

    Attributes:
        mean: shape `(*event)` for one distribution, or `(B, *event)` for one per example.
        variance: positive; of the shape of `mean`, or of one that broadcasts to it.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, data: Tensor, *, variance_floor: float = 0.0) -> Self:
        """Fits mean and variance per dimension by maximum likelihood (Eq. 1).

        Args:
            data: shape `(N, *event)`.
            variance_floor: least variance; where the data's lies below it, the floor is the constrained optimum.

        Raises:
            InfusionError: `data` holds no example.
        """
        data = data.double()
        return cls.from_sums(data.sum(0), data.square().sum(0), len(data), variance_floor=variance_floor)

    @classmethod
    def from_sums(cls, total: Tensor, total_of_squares: Tensor, count: int, *, variance_floor: float = 0.0) -> Self:
        """Fits as `fit` does, from the per-dimension sums over `count` examples.

        Args:
            total: sum of the examples, shape `(*event)`.
            total_of_squares: sum of their squares, shape `(*event)`.
            count: number of examples.
            variance_floor: least variance.

        Returns:
            A distribution of float32 tensors; the sums are handled in float64.

        Raises:
            InfusionError: `count` is less than one.
        """
        if count < 1:
            raise InfusionError("a Gaussian cannot be fitted to no examples; give at least one")
        mean = total.double() / count
        variance = total_of_squares.double() / count - mean.square()
        return cls(mean.float(), variance.clamp(min=variance_floor).float())

    def log_density(self, x: Tensor) -> Tensor:
        """Returns the log density of every dimension, shape `(B, *event)`, in nats."""
        return -0.5 * ((x - self.mean).square() / self.variance + self.variance.log() + LOG_2_PI)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log density of every example, shape `(B,)`, in nats, for `x` of shape `(B, *event)`."""
        return self.log_density(x).flatten(1).sum(1)

    def sample(self, noise: Noise) -> Tensor:
        """Draws one state per mean, of the shape of `mean`."""
        return torch.addcmul(self.mean, self.variance.sqrt(), noise.normal_like(self.mean))

    def expand(self, batch_size: int) -> Self:
        """Returns this unbatched distribution for every example of a batch, without a copy: `(B, *event)`."""
        shape = (batch_size, *self.mean.shape)
        return type(self)(self.mean.expand(shape), self.variance.expand(shape))

    def detach(self) -> Self:
        """Returns the distribution as constants: no gradient flows to what computed it."""
        return type(self)(self.mean.detach(), self.variance.detach())

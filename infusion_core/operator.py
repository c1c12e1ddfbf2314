"""The transition operator p⁽ᵗ⁾(z⁽ᵗ⁾ | z⁽ᵗ⁻¹⁾) (Section 2.2).

A network maps a state and the number of the step to a factorial Gaussian over the next state.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from infusion_core.gaussian import FactorialGaussian
from infusion_core.normalization import StepBatchNorm


class TransitionOperator(nn.Module, ABC):
    """Maps states `(B, *event)` and a step to the distribution of the next state.

    Attributes:
        num_steps: T, the number of steps with parameters of their own; later steps use the last one's.
    """

    num_steps: int

    @abstractmethod
    def forward(self, state: Tensor, step: int) -> FactorialGaussian:
        """Returns p⁽ᵗ⁾(· | z⁽ᵗ⁻¹⁾), mean and variance of shape `(B, *event)`, for t = `step` ≥ 1."""


class MLPOperator(TransitionOperator):
    """A perceptron whose weights are shared by all steps and whose normalisation is not (Section 4).

    Hidden layers are linear, batch-normalised per step, and rectified; two sigmoid heads give the mean, in (0, 1), and
    the variance β · sigmoid(·) + ε.

    Args:
        event_shape: shape of a state.
        num_steps: T.
        hidden_sizes: width of each hidden layer.
        variance_scale: β.
        variance_floor: ε.
        synchronise: see `StepBatchNorm`.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_steps: int,
        *,
        hidden_sizes: Sequence[int] = (1200, 1200),
        variance_scale: float = 0.1,
        variance_floor: float = 1e-4,
        synchronise: bool = True,
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_steps = num_steps
        self.variance_scale = variance_scale
        self.variance_floor = variance_floor
        dimensions = math.prod(event_shape)
        widths = [dimensions, *hidden_sizes]
        # The normalisation's own shift makes a bias before it redundant.
        self.linears = nn.ModuleList(
            nn.Linear(inputs, outputs, bias=False) for inputs, outputs in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(StepBatchNorm(num_steps, width, synchronise=synchronise) for width in hidden_sizes)
        self.head = nn.Linear(widths[-1], 2 * dimensions)

    def forward(self, state: Tensor, step: int) -> FactorialGaussian:
        """See `TransitionOperator.forward`."""
        features = state.flatten(1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            features = torch.relu(norm(linear(features), step))
        heads = self.head(features).view(-1, 2, *self.event_shape)
        return gaussian_from_heads(heads, self.variance_scale, self.variance_floor)


def gaussian_from_heads(heads: Tensor, variance_scale: float, variance_floor: float) -> FactorialGaussian:
    """Returns the distribution that two sigmoid heads, `(B, 2, *event)` before the sigmoid, stand for (Section 4).

    The mean lies in (0, 1); the variance is β · sigmoid + ε.
    """
    # The density is sensitive to rounding of small variances: whatever autocast chose, it is float32 from here.
    precision = torch.promote_types(heads.dtype, torch.float32)
    mean, variance = torch.sigmoid(heads.to(precision)).unbind(1)
    return FactorialGaussian(mean, variance_scale * variance + variance_floor)

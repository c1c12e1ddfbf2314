"""The convolutional transition operator (Section 4): the generator of Salimans et al. 2016 with two heads.

The state goes through one fully connected layer to a small grid of many channels, from which transposed convolutions,
each doubling height and width, lead back to the shape of an image: 32 × 32 by three of them, 64 × 64 by four.

Inside the network a pixel's channels lie side by side in memory (`torch.channels_last`), the order that libraries of
convolutions prefer; states and distributions have the usual one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.normalization import StepBatchNorm
from infusion_core.operator import TransitionOperator, gaussian_from_heads


def check_doubling(event_shape: Sequence[int], hidden_sizes: Sequence[int]) -> None:
    """Checks that height and width can be reached by doubling once for each hidden size.

    Raises:
        InfusionError: they cannot.
    """
    _, height, width = event_shape
    factor = 2 ** len(hidden_sizes)
    if height % factor or width % factor:
        raise InfusionError(
            f"{len(hidden_sizes)} transposed convolutions double height and width each time: images of "
            f"{height} × {width} are no multiple of {factor}; give fewer hidden sizes, or take the mlp network"
        )


class ConvolutionalOperator(TransitionOperator):
    """A generator network whose weights are shared by all steps and whose normalisation is not.

    Hidden layers are batch-normalised per step, and rectified; the transposed convolutions have kernels of 5 × 5 and
    stride 2, the last one leads to the sigmoid heads for mean and variance.

    Args:
        event_shape: channels, height and width of a state.
        num_steps: T.
        hidden_sizes: channels of the grids before each transposed convolution.
        variance_scale: β.
        variance_floor: ε.
        synchronise: see `StepBatchNorm`.

    Raises:
        InfusionError: height or width cannot be halved as often as there are hidden sizes.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_steps: int,
        *,
        hidden_sizes: Sequence[int] = (512, 256, 128),
        variance_scale: float = 0.1,
        variance_floor: float = 1e-4,
        synchronise: bool = True,
    ) -> None:
        super().__init__()
        check_doubling(event_shape, hidden_sizes)
        channels, height, width = event_shape
        factor = 2 ** len(hidden_sizes)
        self.event_shape = tuple(event_shape)
        self.num_steps = num_steps
        self.variance_scale = variance_scale
        self.variance_floor = variance_floor
        self.grid = (hidden_sizes[0], height // factor, width // factor)
        # The normalisation's own shift makes a bias before it redundant.
        self.linear = nn.Linear(math.prod(event_shape), math.prod(self.grid), bias=False)
        widths = [*hidden_sizes[1:], 2 * channels]
        is_last = [False] * (len(widths) - 1) + [True]
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1, bias=last)
            for inputs, outputs, last in zip(hidden_sizes, widths, is_last, strict=True)
        )
        self.norms = nn.ModuleList(
            StepBatchNorm(num_steps, features, synchronise=synchronise)
            for features in (math.prod(self.grid), *hidden_sizes[1:])
        )
        self.convolutions.to(memory_format=torch.channels_last)

    def forward(self, state: Tensor, step: int) -> FactorialGaussian:
        """See `TransitionOperator.forward`."""
        first, *others = self.norms
        features = torch.relu(first(self.linear(state.flatten(1)), step)).view(-1, *self.grid)
        features = features.contiguous(memory_format=torch.channels_last)
        *hidden, head = self.convolutions
        for convolution, norm in zip(hidden, others, strict=True):
            features = torch.relu(norm(convolution(features), step))
        heads = head(features).contiguous().view(-1, 2, *self.event_shape)
        return gaussian_from_heads(heads, self.variance_scale, self.variance_floor)

"""Completion of images of which a part is known (Section 4.3).

The sampling chain runs as ever, but in each of its states the known values are put back: what is missing is denoised
into something that goes with them.
"""

from collections import deque

import torch
from torch import Tensor

from infusion_core.chain import sampling_chain
from infusion_core.errors import InfusionError
from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise, Noise
from infusion_core.sampling import SAMPLES_PER_BATCH


@torch.no_grad()
def inpaint(
    model: InfusionModel,
    images: Tensor,
    known: Tensor,
    seed: int,
    *,
    num_completions: int = 1,
    num_steps: int | None = None,
) -> Tensor:
    """Completes images, several times each; known values come back unchanged.

    Args:
        model: in evaluation mode, on the device of the other arguments.
        images: in [0, 1], shape `(B, C, H, W)`; what they hold where nothing is known is not looked at.
        known: true where a value is known; shape `(H, W)`, `(C, H, W)` or `(B, C, H, W)`.
        seed: of the chains, not negative.
        num_completions: how many for each image.
        num_steps: length of the chain; the number of steps trained for by default.

    Returns:
        Means of the last transition where nothing was known, shape `(B, num_completions, C, H, W)`.

    Raises:
        InfusionError: a shape does not fit the model's images, or a number is out of range.
    """
    config = model.config
    num_steps = config.num_steps if num_steps is None else num_steps
    for name, value, least in (("num_completions", num_completions, 1), ("num_steps", num_steps, 1), ("seed", seed, 0)):
        if value < least:
            raise InfusionError(f"{name} must be at least {least}, not {value}")
    if images.shape[1:] != config.state_shape:
        raise InfusionError(f"the model is for images of shape {config.state_shape}, not {tuple(images.shape[1:])}")
    fitting = (config.state_shape[1:], config.state_shape, tuple(images.shape))
    if known.dtype != torch.bool or tuple(known.shape) not in fitting:
        raise InfusionError(
            f"the mask must be boolean and of one of the shapes {', '.join(map(str, fitting))}, "
            f"not {known.dtype} and {tuple(known.shape)}"
        )
    batch = max(SAMPLES_PER_BATCH // num_completions, 1)
    completed = [
        _complete(
            model,
            some.repeat_interleave(num_completions, 0),
            mask.repeat_interleave(num_completions, 0),
            num_steps,
            GeneratorNoise.from_seed(seed, number, device=images.device),
        )
        for number, (some, mask) in enumerate(
            zip(images.split(batch), known.expand(images.shape).split(batch), strict=True)
        )
    ]
    return torch.cat(completed).view(len(images), num_completions, *config.state_shape)


def _complete(model: InfusionModel, target: Tensor, known: Tensor, num_steps: int, noise: Noise) -> Tensor:
    def clamp(state: Tensor) -> Tensor:
        return torch.where(known, target, state)

    chain = sampling_chain(model.prior, model.operator, num_steps, len(target), noise, clamp=clamp)
    return clamp(deque(chain, maxlen=1).pop().transition.mean)

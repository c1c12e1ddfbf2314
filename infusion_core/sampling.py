"""Drawing any number of samples from a model, a batch at a time (Section 2.2)."""

from collections import deque
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from infusion_core.chain import sampling_chain
from infusion_core.errors import InfusionError
from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise

SAMPLES_PER_BATCH = 1000

LastStep = Literal["mean", "sample"]
"""What of the last transition is taken: its mean, as the paper shows it, or a draw from it."""


def sample_batches(
    model: InfusionModel, num_samples: int, seed: int, *, num_steps: int | None = None, last_step: LastStep = "mean"
) -> Iterator[Tensor]:
    """Yields samples in batches of at most `SAMPLES_PER_BATCH`, shape `(n, C, H, W)`.

    The samples are determined by the model, the seed and the other arguments.

    Args:
        model: in evaluation mode; samples are made on its device.
        num_samples: how many, at least one.
        seed: not negative.
        num_steps: length of the chain, which may exceed the number of steps trained for; that number by default.
        last_step: see `LastStep`.

    Raises:
        InfusionError: an argument is out of range.
    """
    num_steps = model.config.num_steps if num_steps is None else num_steps
    for name, value, least in (("num_samples", num_samples, 1), ("num_steps", num_steps, 1), ("seed", seed, 0)):
        if value < least:
            raise InfusionError(f"{name} must be at least {least}, not {value}")
    if last_step not in get_args(LastStep):
        raise InfusionError(f"last_step is one of {', '.join(get_args(LastStep))}, not {last_step!r}")
    return _sample_batches(model, num_samples, seed, num_steps, last_step)


@torch.no_grad()
def _sample_batches(
    model: InfusionModel, num_samples: int, seed: int, num_steps: int, last_step: LastStep
) -> Iterator[Tensor]:
    for batch, start in enumerate(range(0, num_samples, SAMPLES_PER_BATCH)):
        noise = GeneratorNoise.from_seed(seed, batch, device=model.prior_mean.device)
        count = min(SAMPLES_PER_BATCH, num_samples - start)
        chain = sampling_chain(model.prior, model.operator, num_steps, count, noise)
        last = deque(chain, maxlen=1).pop()
        yield last.transition.mean if last_step == "mean" else last.state

"""Measures sampling beside a DDPM (Ho, Jain and Abbeel, 2020) of equal network size, which takes 1,000 steps.

The DDPM's network is the operator's perceptron with the one head that it needs, without normalisation, and with the
number of the step embedded into the first hidden layer; its steps are taken by diffusers. Neither network is trained:
that does not change what a step costs.
"""

from functools import partial
from itertools import islice, pairwise

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from benchmarks.forward import SAMPLES, forward_flops, sample
from benchmarks.setup import THREADS, Add, short
from benchmarks.timing import in_turns, matmul_rate, seconds_of
from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.sampling import SAMPLES_PER_BATCH

DDPM_STEPS = 1000
TIMED_STEPS = 100


class NoisePredictor(nn.Module):
    """Predicts the noise in states `(B, C, H, W)` that a step of a DDPM takes away."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.widths = [config.dimensions, *config.hidden_sizes, config.dimensions]
        self.linears = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(self.widths))
        self.embedding = nn.Embedding(DDPM_STEPS, self.widths[1])

    def flops(self) -> int:
        """Counts the matrix products of one step of one state."""
        return 2 * sum(inputs * outputs for inputs, outputs in pairwise(self.widths))

    def forward(self, state: Tensor, step: Tensor) -> Tensor:
        """Returns the predicted noise, of the states' shape; the step is that of all of them."""
        first, *others = self.linears
        features: Tensor = first(state.flatten(1)) + self.embedding(step)
        for linear in others:
            features = linear(torch.relu(features))
        return features.view_as(state)


def measure_ddpm(add: Add) -> None:
    """Takes the measurements, all in turns, with the paper's network."""
    torch.set_num_threads(THREADS)
    model = InfusionModel(short(1).model).eval()
    network = NoisePredictor(model.config).eval()
    steps = model.config.num_steps
    chains = (steps, 2 * steps)
    ceiling, ddpm_seconds, *ours_seconds = in_turns(
        matmul_rate,
        partial(seconds_of, partial(denoise, network, model.config)),
        *(partial(seconds_of, partial(sample, model, num_steps)) for num_steps in chains),
    )
    # A step costs the same whichever it is, and all steps of as many samples would take some six minutes a turn.
    ddpm_rate = SAMPLES_PER_BATCH / (ddpm_seconds * DDPM_STEPS / TIMED_STEPS)
    ddpm_share = ddpm_rate * DDPM_STEPS * network.flops() / ceiling
    smaller = network.flops() / forward_flops(model.config)
    for num_steps, seconds, suffix, goal in zip(chains, ours_seconds, ("", "_T30"), ("≥ 50", ""), strict=True):
        rate = SAMPLES / seconds
        share = rate * num_steps * forward_flops(model.config) / ceiling
        add(
            f"samples{suffix}_over_ddpm_{DDPM_STEPS}_steps",
            rate / ddpm_rate,
            "ratio",
            goal,
            f"{rate:,.0f} over {ddpm_rate:.1f} samples/s, T = {num_steps}, at {share:.0%} and {ddpm_share:.0%} of the "
            f"ceiling; products alone would give {DDPM_STEPS:,} / {num_steps} × {smaller:.2f} = "
            f"{DDPM_STEPS / num_steps * smaller:.0f}, as the DDPM has one head for our two; its rate is reckoned from "
            f"{TIMED_STEPS} steps of {SAMPLES_PER_BATCH:,} samples",
        )


@torch.no_grad()
def denoise(network: NoisePredictor, config: ModelConfig) -> None:
    """Takes a DDPM's first `TIMED_STEPS` steps with one batch of samples."""
    height, width, channels = config.image_shape
    generator = torch.Generator().manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=DDPM_STEPS)
    state = torch.randn(SAMPLES_PER_BATCH, channels, height, width, generator=generator)
    for step in islice(scheduler.timesteps, TIMED_STEPS):
        state = scheduler.step(network(state, step), step, state, generator=generator).prev_sample

"""Measures what runs the network forward only, against the machine's matrix products: sampling and evaluation."""

from functools import partial
from itertools import pairwise

import torch

from benchmarks.setup import BATCH, THREADS, Add, short
from benchmarks.timing import in_turns, matmul_rate, seconds_of
from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.noise import GeneratorNoise
from infusion_core.sampling import sample_batches
from pipeline.bound_evaluation import CHUNK_IMAGES, sum_bound
from pipeline.image_judges import ImportanceJudge
from pipeline.training import estimate_statistics

SAMPLES = 10_000
IMAGES = 2000
STATISTICS_BATCHES = 4
IMPORTANCE_IMAGES, CHAINS = 100, 40


def forward_flops(model: ModelConfig) -> int:
    """Counts the matrix products of one transition of one state."""
    widths = [model.dimensions, *model.hidden_sizes, 2 * model.dimensions]
    return 2 * sum(inputs * outputs for inputs, outputs in pairwise(widths))


def measure_forward(add: Add) -> None:
    """Takes the measurements, one after the other, with the paper's network."""
    torch.set_num_threads(THREADS)
    model = InfusionModel(short(1).model).eval()
    images = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8)

    def bound() -> None:
        sum_bound(model, enumerate(images.split(CHUNK_IMAGES)), 0)

    def importance() -> None:
        with torch.no_grad():
            ImportanceJudge(0, (CHAINS,)).judge(model, images[:IMPORTANCE_IMAGES], 0)

    def statistics() -> None:
        estimate_statistics(model, iter(images.repeat(2, 1, 1, 1).split(BATCH)[:STATISTICS_BATCHES]), _noise())

    steps = model.config.num_steps
    for name, work, transitions, what in (
        ("samples", partial(sample, model, steps), SAMPLES * steps, f"{SAMPLES:,} samples, T = {steps}"),
        (
            "samples_T30",
            partial(sample, model, 2 * steps),
            SAMPLES * 2 * steps,
            f"{SAMPLES:,} samples, T = {2 * steps}",
        ),
        ("bound", bound, IMAGES * steps, f"bound of {IMAGES:,} images"),
        (
            "importance_sampling",
            importance,
            IMPORTANCE_IMAGES * CHAINS * steps,
            f"{IMPORTANCE_IMAGES} images × {CHAINS} chains",
        ),
        ("statistics", statistics, STATISTICS_BATCHES * BATCH * steps, "batch statistics of all steps"),
    ):
        ceiling, seconds = in_turns(matmul_rate, partial(seconds_of, work))
        rate = transitions * forward_flops(model.config) / seconds
        note = f"{what}: {rate / 1e9:.0f} of {ceiling / 1e9:.0f} GFLOP/s with {THREADS} threads"
        add(f"{name}_flops_over_matmul_ceiling", rate / ceiling, "ratio", "", note)
        if name == "samples":
            samples_per_second = rate / forward_flops(model.config) / steps
            add("samples_per_second", samples_per_second, "samples/s", "", f"T = {steps}, {THREADS} threads")


def _noise() -> GeneratorNoise:
    return GeneratorNoise.from_seed(0)


def sample(model: InfusionModel, num_steps: int) -> None:
    """Draws `SAMPLES` samples by a chain of so many steps."""
    for _ in sample_batches(model, SAMPLES, 0, num_steps=num_steps):
        pass

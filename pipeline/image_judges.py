"""The judges of single images: the lower bound, importance sampling, and annealed importance sampling."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from infusion_core.annealing import annealed_log_weight, inverse_temperatures
from infusion_core.bound import bound_estimates, log_weight
from infusion_core.chain import infusion_chain
from infusion_core.importance import LogWeightSums, importance_sampling
from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise, Noise
from infusion_core.pixels import dequantise
from pipeline.image_judging import Figures

# The same for all judges, and whatever their settings, so that all of them see the same dequantised images.
IMAGES_PER_UNIT = 100
# Values of the states that are computed at a time; some twenty tensors of that size are alive then.
VALUES_AT_ONCE = 4_000_000


def _rows_at_once(model: InfusionModel) -> int:
    config = model.config
    widest = max(config.dimensions, *config.hidden_sizes)
    if config.network == "convolutional":
        # The last hidden grid has half the images' height and width.
        widest = max(widest, config.hidden_sizes[-1] * config.image_shape[0] * config.image_shape[1] // 4)
    return max(VALUES_AT_ONCE // widest, 1)


def _target(model: InfusionModel, images: Tensor, seed: int, unit: int) -> tuple[Tensor, Noise]:
    """Returns dequantised images, and the noise that goes on from there."""
    noise = GeneratorNoise.from_seed(seed, unit, device=images.device)
    return dequantise(images, model.config.levels, noise), noise


@dataclass(frozen=True)
class BoundJudge:
    """The lower bound, by one chain an image.

    Attributes:
        seed: of all noise.
        output_variance: see `log_weight`.

    Figures are the addends of the bound, and the same with the choice between components averaged out (`averaged_…`).
    """

    seed: int
    output_variance: float | None = None
    images_per_unit: int = IMAGES_PER_UNIT

    def judge(self, model: InfusionModel, images: Tensor, unit: int) -> Figures:
        """See `ImageJudge.judge`."""
        target, noise = _target(model, images, self.seed, unit)
        weight, averaged = bound_estimates(
            model.prior, model.operator, model.schedule, target, noise, output_variance=self.output_variance
        )
        return {
            prefix + name: getattr(estimate, name).double()
            for prefix, estimate in (("", weight), ("averaged_", averaged))
            for name in ("prior", "transitions", "reconstruction")
        }


@dataclass(frozen=True)
class ReconstructionErrorJudge:
    """The squared error of the last transition's mean, ‖x - μ⁽ᵀ⁾‖², by one chain an image (`squared_error`)."""

    seed: int
    images_per_unit: int = IMAGES_PER_UNIT

    def judge(self, model: InfusionModel, images: Tensor, unit: int) -> Figures:
        """See `ImageJudge.judge`."""
        target, noise = _target(model, images, self.seed, unit)
        *_, last = infusion_chain(model.prior, model.operator, model.schedule, target, noise)
        return {"squared_error": (target - last.transition.mean).double().square().flatten(1).sum(1)}


@dataclass(frozen=True)
class ImportanceJudge:
    """The importance-sampling estimate at several numbers of chains.

    Attributes:
        seed: of all noise.
        num_chains: k, increasing.
        output_variance: see `log_weight`.

    Figures are, in columns by k, `estimate` and `effective_sample_size`.
    """

    seed: int
    num_chains: tuple[int, ...]
    output_variance: float | None = None
    images_per_unit: int = IMAGES_PER_UNIT

    def judge(self, model: InfusionModel, images: Tensor, unit: int) -> Figures:
        """See `ImageJudge.judge`."""
        target, _ = _target(model, images, self.seed, unit)

        def log_weights(rows: Tensor, noise: Noise) -> Tensor:
            return log_weight(
                model.prior, model.operator, model.schedule, rows, noise, output_variance=self.output_variance
            ).total

        rows = max(_rows_at_once(model), len(images))
        sums = list(importance_sampling(log_weights, target, (self.seed, unit), self.num_chains, rows_at_once=rows))
        return _estimates(sums)


@dataclass(frozen=True)
class AnnealingJudge:
    """The annealed importance-sampling estimate.

    Attributes:
        seed: of all noise.
        num_temperatures: of each chain; its cost is that of as many infusion chains.
        num_chains: annealed chains an image.

    Figures are, in one column, `estimate` and `effective_sample_size`.
    """

    seed: int
    num_temperatures: int
    num_chains: int = 1
    images_per_unit: int = IMAGES_PER_UNIT

    def judge(self, model: InfusionModel, images: Tensor, unit: int) -> Figures:
        """See `ImageJudge.judge`."""
        target, _ = _target(model, images, self.seed, unit)
        anneal = partial(
            annealed_log_weight,
            model.prior,
            model.operator,
            model.schedule,
            temperatures=inverse_temperatures(self.num_temperatures),
        )
        # A chain keeps the noise of all of its steps twice.
        rows = max(_rows_at_once(model) // (2 * model.config.num_steps), 1)

        def log_weights(rows: Tensor, noise: Noise) -> Tensor:
            return anneal(target=rows, noise=noise).total

        parts = [
            _estimates(
                list(
                    importance_sampling(
                        log_weights,
                        part,
                        (self.seed, unit, number),
                        [self.num_chains],
                        rows_at_once=max(rows, len(part)),
                    )
                )
            )
            for number, part in enumerate(target.split(rows))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _estimates(sums: list[LogWeightSums]) -> Figures:
    return {
        "estimate": torch.stack([at_k.estimate for at_k in sums], 1),
        "effective_sample_size": torch.stack([at_k.effective_sample_size for at_k in sums], 1),
    }

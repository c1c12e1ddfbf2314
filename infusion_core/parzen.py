r"""The Parzen-window estimate of the log-likelihood (Table 1).

A Gaussian of one standard deviation σ, the bandwidth, is laid around each of S samples of a model:

.. math:: \log p(x) \approx \log \frac1S \sum_{s=1}^{S} \mathcal{N}(x; y_s, \sigma^2 I).

It judges samples, of any model, rather than the model's own density.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infusion_core.errors import InfusionError
from infusion_core.gaussian import LOG_2_PI

# Rows and columns of the matrix of distances that is in memory at a time.
_EXAMPLES_AT_ONCE = 1000
_SAMPLES_AT_ONCE = 1000


@dataclass(frozen=True)
class ParzenEstimate:
    """The Parzen-window estimate for a set of examples.

    Attributes:
        bandwidth: σ.
        log_densities: of every example, float64 of shape `(N,)`, in nats.
    """

    bandwidth: float
    log_densities: Tensor

    @property
    def mean(self) -> float:
        """The mean log density, in nats per example."""
        return float(self.log_densities.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` over the examples; NaN for fewer than two."""
        count = len(self.log_densities)
        return float(self.log_densities.std()) / math.sqrt(count) if count > 1 else math.nan


def parzen_estimates(
    examples: Tensor, samples: Iterable[Tensor], bandwidths: Sequence[float]
) -> tuple[ParzenEstimate, ...]:
    """Returns the Parzen-window estimates of several bandwidths, in one pass over the samples.

    Args:
        examples: x, shape `(N, *event)`; they stay in memory, as blocks of float64.
        samples: batches of samples, shape `(n, *event)`, of which one is kept at a time.
        bandwidths: σ, all positive.

    Raises:
        InfusionError: there is no example, sample or bandwidth, or one of them cannot be used.
    """
    if not bandwidths or not all(0 < bandwidth < math.inf for bandwidth in bandwidths):
        raise InfusionError(f"a Parzen window needs a bandwidth σ above 0, not {list(bandwidths)}")
    if not len(examples):
        raise InfusionError("a Parzen-window estimate needs at least one example to judge the samples by")
    dimensions = examples[0].numel()
    # Distances do not change where both are moved; near the origin their squares lose least to rounding.
    centre = examples.mean(0, dtype=torch.float64)
    log_sums = centre.new_full((len(bandwidths), len(examples)), -math.inf)
    count = 0
    for batch in samples:
        if batch.shape[1:] != examples.shape[1:]:
            raise InfusionError(
                f"samples of shape {tuple(batch.shape[1:])} cannot be compared with examples of shape "
                f"{tuple(examples.shape[1:])}"
            )
        if not batch.isfinite().all():
            raise InfusionError(f"one of samples {count} to {count + len(batch) - 1} is not of finite numbers")
        count += len(batch)
        for some in batch.split(_SAMPLES_AT_ONCE):
            moved = (some.to(centre) - centre).flatten(1)
            start = 0
            for block in examples.split(_EXAMPLES_AT_ONCE):
                distances = _squared_distances((block.to(centre) - centre).flatten(1), moved)
                part = log_sums[:, start : start + len(block)]
                for row, bandwidth in zip(part, bandwidths, strict=True):
                    torch.logaddexp(row, torch.logsumexp(distances / (-2 * bandwidth**2), 1), out=row)
                start += len(block)
    if count == 0:
        raise InfusionError("a Parzen-window estimate needs at least one sample; none was given")
    return tuple(
        ParzenEstimate(bandwidth, row - math.log(count) - dimensions * (math.log(bandwidth) + LOG_2_PI / 2))
        for bandwidth, row in zip(bandwidths, log_sums, strict=True)
    )


def parzen_estimate(examples: Tensor, samples: Iterable[Tensor], bandwidth: float) -> ParzenEstimate:
    """Returns the Parzen-window estimate of one bandwidth; see `parzen_estimates`."""
    (estimate,) = parzen_estimates(examples, samples, [bandwidth])
    return estimate


def choose_bandwidth(validation: Tensor, samples: Iterable[Tensor], bandwidths: Sequence[float]) -> float:
    """Returns the bandwidth, of a grid, at which validation examples have the highest mean log density.

    Args and errors as those of `parzen_estimates`. Where several are as good, the first of the grid is returned.
    """
    return max(parzen_estimates(validation, samples, bandwidths), key=lambda estimate: estimate.mean).bandwidth


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns ‖a - b‖² for every row of `a`, `(N, D)`, and every one of `b`, `(n, D)`: shape `(N, n)`."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)

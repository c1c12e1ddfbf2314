r"""The importance-sampling estimate of the log-likelihood (Eq. 2, footnote 4).

A chain's weight exp ℓ averages to p(x), so that with k chains an example

.. math:: \log p(x) \approx \log \frac1k \sum_{i=1}^{k} e^{\ell_i}.

The estimate is itself a lower bound in expectation, which rises with k; at k = 1 it is that of Eq. 3. How many weights
it rests on in effect is the effective sample size, (Σ w)² / Σ w² with w = exp ℓ: k if all weights are alike, 1 if one
outweighs all the others.

Where the weights come from is the caller's: of infusion chains (`infusion_core.bound`), or of annealed ones
(`infusion_core.annealing`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from infusion_core.errors import InfusionError
from infusion_core.noise import ConcatenatedNoise, GeneratorNoise, Noise

ROWS_AT_ONCE = 1000

LogWeights = Callable[[Tensor, Noise], Tensor]
"""Called with x, shape `(N, *event)`, and a source of randomness: returns log weights, shape `(N,)`, in nats, whose
exponentials average to p(x)."""


@dataclass(frozen=True)
class LogWeightSums:
    """Sums over the log weights of any number of chains, for every example of a batch.

    Attributes:
        values: a float64 tensor of shape `(4, B)`, whose rows are the number of chains, log Σ exp ℓ, log Σ exp 2ℓ and
            Σ ℓ.

    Raises:
        InfusionError: `values` is not such a tensor.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float64 or self.values.dim() != 2 or len(self.values) != 4:
            raise InfusionError(
                "sums over log weights are a float64 tensor of 4 rows, "
                f"not one of {self.values.dtype} and shape {tuple(self.values.shape)}"
            )

    @classmethod
    def empty(cls, num_examples: int, *, device: torch.device | str = "cpu") -> Self:
        """Returns the sums over no chains."""
        start = torch.tensor([0, -math.inf, -math.inf, 0], dtype=torch.float64, device=device)
        return cls(start[:, None].repeat(1, num_examples))

    def update(self, log_weights: Tensor) -> Self:
        """Returns the sums with those over ℓ of further chains, shape `(k, B)`, added."""
        weights = log_weights.double()
        count = torch.full_like(self.values[0], len(weights))
        return self.merge(
            type(self)(torch.stack([count, weights.logsumexp(0), (2 * weights).logsumexp(0), weights.sum(0)]))
        )

    def merge(self, other: Self) -> Self:
        """Returns the sums over the chains of both, which are of the same examples."""
        mine, theirs = self.values, other.values
        logs = torch.logaddexp(mine[1:3], theirs[1:3])
        return type(self)(torch.cat([mine[:1] + theirs[:1], logs, mine[3:] + theirs[3:]]))

    @property
    def num_chains(self) -> Tensor:
        """k, shape `(B,)`."""
        return self.values[0]

    @property
    def estimate(self) -> Tensor:
        """The importance-sampling estimate of log p(x), shape `(B,)`, in nats; NaN for no chains."""
        return self.values[1] - self.num_chains.log()

    @property
    def lower_bound(self) -> Tensor:
        """The mean log weight, an estimate of the lower bound (Eq. 3), shape `(B,)`, in nats; NaN for no chains."""
        return self.values[3] / self.num_chains

    @property
    def effective_sample_size(self) -> Tensor:
        """(Σ w)² / Σ w², between 1 and k, shape `(B,)`; NaN for no chains."""
        return (2 * self.values[1] - self.values[2]).exp()


def importance_sampling(
    log_weights: LogWeights,
    target: Tensor,
    entropy: Sequence[int],
    num_chains: Sequence[int],
    *,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Iterator[LogWeightSums]:
    """Yields the sums over the log weights of the first k chains of every example, for every k asked for.

    A chain's noise is determined by `entropy` and the chain's number: neither `rows_at_once` nor the choice of k
    changes more than rounding.

    Args:
        log_weights: draws a log weight for every row that it is called with.
        target: x, shape `(B, *event)`.
        entropy: non-negative integers; see `GeneratorNoise.from_seed`.
        num_chains: the k asked for, increasing.
        rows_at_once: the most rows, B to a chain, that `log_weights` is called with; it bounds the memory.

    Raises:
        InfusionError: an argument is out of range.
    """
    batch_size = len(target)
    if not num_chains or num_chains[0] < 1:
        raise InfusionError(f"an importance-sampling estimate needs at least one chain, not k = {list(num_chains)}")
    if any(later <= earlier for earlier, later in itertools.pairwise(num_chains)):
        raise InfusionError(f"the numbers of chains must increase, which k = {list(num_chains)} do not")
    if not 1 <= batch_size <= rows_at_once:
        raise InfusionError(
            f"a batch of {batch_size} examples is not from 1 to rows_at_once = {rows_at_once}; split it differently"
        )
    return _importance_sampling(log_weights, target, entropy, num_chains, rows_at_once)


@torch.no_grad()
def _importance_sampling(
    log_weights: LogWeights,
    target: Tensor,
    entropy: Sequence[int],
    num_chains: Sequence[int],
    rows_at_once: int,
) -> Iterator[LogWeightSums]:
    batch_size = len(target)
    chains_at_once = rows_at_once // batch_size
    sums, done = LogWeightSums.empty(batch_size, device=target.device), 0
    for goal in num_chains:
        while done < goal:
            chains = range(done, min(done + chains_at_once, goal))
            noise = ConcatenatedNoise(
                [GeneratorNoise.from_seed(*entropy, chain, device=target.device) for chain in chains]
            )
            rows = target.repeat(len(chains), *[1] * (target.dim() - 1))
            sums = sums.update(log_weights(rows, noise).view(len(chains), batch_size))
            done = chains.stop
        yield sums

"""The one place that randomness enters by.

Everything random in this package (dequantisation, infusion masks, Gaussian draws) is asked of a `Noise`, in the
order in which the computation needs it. What a seed determines is thereby visible, frozen noise is a replayed seed,
and another source (the concatenated noise of several workers, say) can stand in for a generator.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """A source of independent random numbers."""

    def normal_like(self, like: Tensor) -> Tensor:
        """Returns standard Gaussian draws of the shape, type and device of `like`."""
        ...

    def uniform_like(self, like: Tensor) -> Tensor:
        """Returns draws from U[0, 1) of the shape, type and device of `like`."""
        ...

    def bernoulli_like(self, like: Tensor, probability: float) -> Tensor:
        """Returns booleans of the shape and device of `like`, each true with the given probability."""
        ...


class GeneratorNoise:
    """Noise from a `torch.Generator`, which must live on the device that the noise is asked for."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    @classmethod
    def from_seed(cls, *entropy: int, device: torch.device | str = "cpu") -> "GeneratorNoise":
        """Returns noise that is determined by a sequence of non-negative integers, such as (seed, epoch, rank).

        Sequences that differ anywhere give streams that are unrelated, which `seed + rank` would not.
        """
        return cls(torch.Generator(device).manual_seed(derive_seed(entropy)))

    def normal_like(self, like: Tensor) -> Tensor:
        """See `Noise.normal_like`."""
        return torch.empty_like(like).normal_(generator=self.generator)

    def uniform_like(self, like: Tensor) -> Tensor:
        """See `Noise.uniform_like`."""
        return torch.empty_like(like).uniform_(generator=self.generator)

    def bernoulli_like(self, like: Tensor, probability: float) -> Tensor:
        """See `Noise.bernoulli_like`."""
        if like.device.type == "cpu" and 0 < probability <= _SPARSE_PROBABILITY:
            return self._sparse_bernoulli_like(like, probability)
        return torch.empty_like(like, dtype=torch.bool).bernoulli_(probability, generator=self.generator)

    def _sparse_bernoulli_like(self, like: Tensor, probability: float) -> Tensor:
        # The gaps between the successes of independent trials are geometric: drawing these instead of the trials costs
        # a CPU as much less as successes are rarer.
        total = like.numel()
        expected = total * probability
        draws = int(expected + 6 * expected**0.5) + 8
        positions, last = [], -1.0
        while last < total:
            gaps = torch.empty(draws, dtype=torch.float64).geometric_(probability, generator=self.generator)
            positions.append(gaps.cumsum(0) + last)
            last = float(positions[-1][-1])
        successes = torch.cat(positions)
        mask = torch.zeros(total, dtype=torch.bool)
        mask[successes[successes < total].long()] = True
        return mask.view(like.shape)


class ConcatenatedNoise:
    """Noise of several sources, each of which serves an equal part of what is asked for along the first dimension."""

    def __init__(self, sources: Sequence[Noise]) -> None:
        self.sources = sources

    def normal_like(self, like: Tensor) -> Tensor:
        """See `Noise.normal_like`."""
        return self._concatenate(like, lambda source, part: source.normal_like(part))

    def uniform_like(self, like: Tensor) -> Tensor:
        """See `Noise.uniform_like`."""
        return self._concatenate(like, lambda source, part: source.uniform_like(part))

    def bernoulli_like(self, like: Tensor, probability: float) -> Tensor:
        """See `Noise.bernoulli_like`."""
        return self._concatenate(like, lambda source, part: source.bernoulli_like(part, probability))

    def _concatenate(self, like: Tensor, draw: Callable[[Noise, Tensor], Tensor]) -> Tensor:
        parts = like.chunk(len(self.sources))
        return torch.cat([draw(source, part) for source, part in zip(self.sources, parts, strict=True)])


# Above, drawing every trial is as cheap.
_SPARSE_PROBABILITY = 0.25


def derive_seed(entropy: Sequence[int]) -> int:
    """Returns a 63-bit seed that depends on every one of the given non-negative integers."""
    # Not numpy's SeedSequence: to it, (1,) and (1, 0) are the same.
    digest = hashlib.blake2b(",".join(map(str, entropy)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1

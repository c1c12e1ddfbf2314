"""The lower bound of a model over a split, as sums that can be added up over chunks and workers.

A split is cut into chunks of a fixed number of images, and a chunk's noise is determined by the seed and the chunk's
number: the result does not depend, but for rounding, on how many workers share the chunks out, nor on how many chunks
go through the network at once.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Self

import torch
from torch import Tensor

from infusion_core.bound import log_weight
from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel
from infusion_core.noise import ConcatenatedNoise, GeneratorNoise
from infusion_core.pixels import dequantise
from pipeline.manifest import Manifest
from pipeline.shards import load_rows, share

CHUNK_IMAGES = 250
# Matrix products of a single chunk reach nine tenths of the speed of these.
CHUNKS_AT_ONCE = 4
READ_BYTES = 64 * 2**20

Chunk = tuple[int, Tensor]
"""The number of a chunk, and its images: uint8, shape `(n, C, H, W)`."""


@dataclass(frozen=True)
class BoundSums:
    """Sums over images of the lower bound's addends and of its square.

    Attributes:
        values: float64 tensor: count, Σ prior, Σ transitions, Σ reconstruction, Σ ℓ². Sums of two parts of a split, or
            of two workers, may be added.
    """

    values: Tensor

    @classmethod
    def of(cls, addends: Tensor) -> Self:
        """Returns the sums over images of the bound's addends, shape `(3, n)`, in the order of `LogWeight`."""
        addends = addends.double()
        squares = addends.sum(0).square().sum()
        return cls(torch.cat([addends.new_tensor([addends.shape[1]]), addends.sum(1), squares[None]]))

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.values[0])

    @property
    def mean(self) -> float:
        """The lower bound, in nats per image."""
        return float(self.values[1:4].sum() / self.values[0])

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` over images; NaN for fewer than two."""
        if self.count < 2:
            return math.nan
        variance = (float(self.values[4]) / self.count - self.mean**2) * self.count / (self.count - 1)
        return math.sqrt(max(variance, 0.0) / self.count)

    @property
    def addends(self) -> dict[str, float]:
        """The means of the bound's addends, in nats per image."""
        means = (self.values[1:4] / self.values[0]).tolist()
        return dict(zip(("prior", "transitions", "reconstruction"), means, strict=True))


def chunk_share(rows: int, rank: int, world_size: int) -> range:
    """Returns the numbers of the chunks that worker `rank` evaluates of a split of `rows` images."""
    return share(math.ceil(rows / CHUNK_IMAGES), rank, world_size)


def load_chunks(dataset: str, manifest: Manifest, split: str, chunks: range) -> Iterator[Chunk]:
    """Reads the chunks of a split, some 64 MiB of them at a time."""
    chunks_at_once = max(READ_BYTES // (CHUNK_IMAGES * manifest.image_bytes), 1)
    for first in range(chunks.start, chunks.stop, chunks_at_once):
        block = range(first, min(first + chunks_at_once, chunks.stop))
        stop = min(block.stop * CHUNK_IMAGES, manifest.rows(split))
        images = load_rows(dataset, manifest, split, block.start * CHUNK_IMAGES, stop)
        yield from zip(block, images.split(CHUNK_IMAGES), strict=True)


def sum_bound(model: InfusionModel, chunks: Iterable[Chunk], seed: int) -> BoundSums:
    """Draws one infusion chain per image of the chunks and sums up their log weights.

    The model must be in evaluation mode, on the device where the work is to be done.
    """
    device = model.prior_mean.device
    total = torch.zeros(5, dtype=torch.float64, device=device)
    with torch.no_grad():
        for numbers, images in _grouped(chunks):
            noise = ConcatenatedNoise([GeneratorNoise.from_seed(seed, number, device=device) for number in numbers])
            target = dequantise(images.to(device), model.config.levels, noise)
            weight = log_weight(model.prior, model.operator, model.schedule, target, noise)
            total += BoundSums.of(torch.stack([weight.prior, weight.transitions, weight.reconstruction])).values
    return BoundSums(total.cpu())


def _grouped(chunks: Iterable[Chunk]) -> Iterator[tuple[list[int], Tensor]]:
    """Yields chunks of equally many images together: their numbers, and all of their images."""
    for _, alike in groupby(chunks, key=lambda chunk: len(chunk[1])):
        while group := list(islice(alike, CHUNKS_AT_ONCE)):
            numbers, images = zip(*group, strict=True)
            yield list(numbers), torch.cat(images)


def sum_log_prob(distribution: FactorialGaussian, chunks: Iterable[Chunk], levels: int, seed: int) -> BoundSums:
    """Sums up the log-likelihoods of a factorial Gaussian, with the dequantisation noise that `sum_bound` uses.

    All of it stands under `reconstruction`: a Gaussian has neither prior nor transitions.
    """
    device = distribution.mean.device
    total = torch.zeros(5, dtype=torch.float64, device=device)
    for chunk, images in chunks:
        noise = GeneratorNoise.from_seed(seed, chunk, device=device)
        log_prob = distribution.log_prob(dequantise(images.to(device), levels, noise)).double()
        total[0] += len(images)
        total[3:] += torch.stack([log_prob.sum(), log_prob.square().sum()])
    return BoundSums(total.cpu())

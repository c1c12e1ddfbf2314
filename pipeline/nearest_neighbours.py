r"""The training images that are nearest to samples (Figure 4): whether a model has learnt its data by heart.

Distances are Euclidean, between grey levels: a sample is quantised to those of the data set first. All terms of
‖a - b‖² = ‖a‖² + ‖b‖² - 2 a·b are then whole numbers below 2⁵³, which float64 adds up without error in any order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infusion_core.pixels import quantise
from pipeline.bound_evaluation import CHUNK_IMAGES, chunk_share, load_chunks
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.progress import Progress


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each of N samples, the nearest first, and of equally near ones the one of the lower row.

    Attributes:
        rows: their rows in the split, int64, shape `(N, count)`.
        distances: Euclidean distances between pixels in [0, 1], float64, shape `(N, count)`.
        images: uint8 grey levels, shape `(N, count, C, H, W)`.
    """

    rows: Tensor
    distances: Tensor
    images: Tensor


@torch.no_grad()
def nearest_neighbours(
    samples: Tensor,
    dataset: str,
    manifest: Manifest,
    *,
    split: str = "train",
    count: int = 1,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """Finds the images of a split that are nearest to samples, in one pass over it.

    Memory holds the result and two reads of some 64 MiB, however large the split is, and 250 distances a sample.

    Args:
        samples: shape `(N, C, H, W)`, pixels in [0, 1]; values outside are clipped.
        dataset: address of the staged data set.
        manifest: its manifest.
        split: the split to search.
        count: how many neighbours of each sample.
        device: where to compute.

    Raises:
        UserError: the samples are not of the data set's kind, or the split has fewer than `count` images.
    """
    height, width, channels = manifest.image_shape
    total = manifest.rows(split)
    if samples.shape[1:] != (channels, height, width):
        raise UserError(
            f"{dataset} holds images of shape {(channels, height, width)} (channels, height, width), "
            f"but the samples are of shape {tuple(samples.shape[1:])}; draw them from a model of this data set"
        )
    if not 1 <= count <= total:
        raise UserError(f"the number of neighbours must be from 1 to the {total} images of {dataset}'s {split} split")
    levels = quantise(samples.to(device), manifest.levels).flatten(1).double()
    norms = levels.square().sum(1, keepdim=True)
    # One whole number holds distance and row: the least is the nearest, and of equally near ones the lowest row.
    best = torch.empty(len(samples), 0, dtype=torch.int64, device=device)
    images = torch.empty(len(samples), 0, channels, height, width, dtype=torch.uint8, device=device)
    with Progress("search nearest neighbours", total, "images") as progress:
        for number, host_chunk in load_chunks(dataset, manifest, split, chunk_share(total, 0, 1)):
            chunk = host_chunk.to(device)
            others = chunk.flatten(1).double()
            squares = norms + others.square().sum(1) - 2 * levels @ others.T
            rows = torch.arange(len(chunk), device=device) + number * CHUNK_IMAGES
            keys = torch.cat([best, squares.long() * total + rows], 1)
            best, places = keys.topk(min(count, keys.shape[1]), 1, largest=False)
            images = _pick(images, chunk, places)
            progress.advance(len(chunk))
    return Neighbours(
        rows=(best % total).cpu(),
        distances=(best // total).double().sqrt().div(manifest.levels).cpu(),
        images=images.cpu(),
    )


def _pick(images: Tensor, chunk: Tensor, places: Tensor) -> Tensor:
    """Returns for each sample the images at `places` among its own, `(N, n, …)`, followed by those of the chunk."""
    n = images.shape[1]
    picked = chunk[(places - n).clamp(min=0)]
    sample, place = (places < n).nonzero(as_tuple=True)
    picked[sample, place] = images[sample, places[sample, place]]
    return picked

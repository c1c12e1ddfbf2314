"""The images that one worker trains on: in device memory, in host memory, or streamed, whichever is first to fit."""

import os
from collections.abc import Iterator
from typing import Protocol

import psutil
import torch
from torch import Tensor

from infusion_core.noise import derive_seed
from pipeline.manifest import Manifest
from pipeline.shards import load_rows, share, stream_batches


class TrainingImages(Protocol):
    """A worker's share of a training split."""

    @property
    def placement(self) -> str:
        """Where the images are kept, for the log."""
        ...

    @property
    def streamed(self) -> bool:
        """Whether they are read anew in every epoch, which gives them another order than images kept in memory."""
        ...

    def batches(self, batch_size: int, *entropy: int) -> Iterator[Tensor]:
        """Yields uint8 batches `(batch_size, C, H, W)` on the worker's device.

        The order is a function of `entropy` alone. Every image comes once, but for those that would make an incomplete
        last batch.
        """
        ...


def open_training_images(
    dataset: str,
    manifest: Manifest,
    split: str,
    rank: int,
    world_size: int,
    device: torch.device,
    memory_limit: int | None = None,
) -> TrainingImages:
    """Opens the share of a split that belongs to worker `rank` of `world_size`.

    Args:
        dataset: address of the staged data set.
        manifest: its manifest.
        split: name of the split.
        rank: the worker's rank.
        world_size: number of workers.
        device: where batches are wanted.
        memory_limit: bytes that the share may occupy; by default half of what is free (of the device's memory, or of
            the host's, divided among the workers on it).
    """
    rows = share(manifest.rows(split), rank, world_size)
    size = len(rows) * manifest.image_bytes
    if device.type == "cuda":
        limit = memory_limit if memory_limit is not None else torch.cuda.mem_get_info(device)[0] // 2
        if size <= limit:
            images = load_rows(dataset, manifest, split, rows.start, rows.stop)
            return _ResidentImages(images.to(device), device)
    if size <= (memory_limit if memory_limit is not None else _free_host_memory() // 2):
        return _ResidentImages(load_rows(dataset, manifest, split, rows.start, rows.stop), device)
    return _StreamedImages(dataset, manifest, split, rows, device)


def _free_host_memory() -> int:
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available) // workers_here


class _ResidentImages:
    streamed = False

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images
        self._device = device

    @property
    def placement(self) -> str:
        return f"{self._images.device.type} memory ({self._images.nbytes / 2**20:,.1f} MiB)"

    def batches(self, batch_size: int, *entropy: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(entropy))
        order = torch.randperm(len(self._images), generator=generator).to(self._images.device)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = self._images[order[start : start + batch_size]]
            yield batch.to(self._device, non_blocking=True)


class _StreamedImages:
    streamed = True

    def __init__(self, dataset: str, manifest: Manifest, split: str, rows: range, device: torch.device) -> None:
        self._dataset = dataset
        self._manifest = manifest
        self._split = split
        self._rows = rows
        self._device = device

    @property
    def placement(self) -> str:
        return f"streamed from {self._dataset}"

    def batches(self, batch_size: int, *entropy: int) -> Iterator[Tensor]:
        for batch in stream_batches(
            self._dataset,
            self._manifest,
            self._split,
            self._rows.start,
            self._rows.stop,
            batch_size,
            derive_seed(entropy),
        ):
            yield batch.to(self._device, non_blocking=True)

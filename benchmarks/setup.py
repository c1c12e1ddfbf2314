"""What the benchmarks have in common: their rows, their images, and the configuration that they train."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.presets import mnist
from pipeline.sources import SourceOptions, open_source
from pipeline.staging import stage
from pipeline.training import TrainConfig

THREADS = 2
STEPS_PER_EPOCH = 6
BATCH = 512
VALID_IMAGES = 512
REPEATS = 3

Add = Callable[[str, float | None, str, str, str], None]
"""Called with the name, value (or `None`: not measured), unit, goal and note of a row."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    value: float | None
    unit: str
    goal: str
    note: str


def printed(name: str, value: float | None, unit: str, goal: str, note: str) -> str:
    """Returns a row as it is printed."""
    shown = "not measured" if value is None else f"{value:,.3f}"
    return f"{name:<46} {shown:>12} {unit:<10} {goal or '-':<8} {note}"


def short(epochs: int, num_steps: int = 15) -> TrainConfig:
    """Returns the paper's configuration for a few epochs."""
    config = mnist()
    return dataclasses.replace(
        config,
        epochs=epochs,
        parzen_bandwidth=None,
        global_batch=BATCH,
        statistics_images=BATCH,
        model=dataclasses.replace(config.model, num_steps=num_steps),
    )


def random_images(file: Path, train: int, test: int = VALID_IMAGES) -> str:
    """Writes random images of MNIST's shape; returns the name of the source that reads them."""
    rng = np.random.default_rng(0)
    np.savez(
        file,
        train_images=rng.integers(0, 256, (train, 28, 28), np.uint8),
        test_images=rng.integers(0, 256, (test, 28, 28), np.uint8),
    )
    return f"npz:{file}"


def stage_epoch(folder: Path, dataset: str, steps: int) -> str:
    """Stages images for epochs of so many steps, and a few to validate on; returns the data set's address."""
    train = steps * BATCH + VALID_IMAGES
    source = random_images(folder / f"{steps}-steps.npz", train)
    return stage(open_source(source, SourceOptions(valid_fraction=VALID_IMAGES / train)), dataset).dataset

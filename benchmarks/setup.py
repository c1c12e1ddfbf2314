"""What the benchmarks have in common: their rows, their images, and the configuration that they train."""

import argparse
import dataclasses
import json
import re
import resource
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.presets import mnist
from pipeline.sources import SourceOptions, open_source
from pipeline.staging import stage
from pipeline.training import TrainConfig

THREADS = 2
STEPS_PER_EPOCH = 6
BATCH = 512
VALID_IMAGES = 512
IMAGE_BYTES = 28 * 28
REPEATS = 3
BLOCK_IMAGES = 10_000

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


def spec_of_process(module: str, description: str | None) -> dict[str, Any]:
    """Returns what this process, one that a benchmark started for itself, is told to do on its command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=json.loads, help="what to do: a JSON object, as above")
    spec: dict[str, Any] = parser.parse_args().spec
    return spec


def peak_memory() -> int:
    """Returns the most bytes that this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux: not ru_maxrss, which a child inherits from the process that started it.
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert found is not None, "Linux says it of every process"
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_images(file: Path, train: int, test: int = VALID_IMAGES) -> str:
    """Writes random images of MNIST's shape, a block at a time; returns the name of the source that reads them."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(file, "w") as archive:
        for name, images in (("train_images", train), ("test_images", test)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (images, 28, 28)}
                np.lib.format.write_array_header_1_0(member, header)
                for start in range(0, images, BLOCK_IMAGES):
                    member.write(rng.bytes(min(BLOCK_IMAGES, images - start) * IMAGE_BYTES))
    return f"npz:{file}"


def stage_epoch(folder: Path, dataset: str, steps: int) -> str:
    """Stages images for epochs of so many steps, and a few to validate on; returns the data set's address."""
    train = steps * BATCH + VALID_IMAGES
    source = random_images(folder / f"{steps}-steps.npz", train)
    return stage(open_source(source, SourceOptions(valid_fraction=VALID_IMAGES / train)), dataset).dataset

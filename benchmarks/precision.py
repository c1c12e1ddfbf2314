"""Trains the digits with every precision and compiled, and prints what bounds that leads to.

    python -m benchmarks.precision

The differences between seeds are the noise that a difference between precisions is to be compared with. It takes five
minutes on one core; with a GPU, `--device cuda` adds TF32.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch

from pipeline.manifest import Manifest
from pipeline.presets import digits
from pipeline.sources import open_source
from pipeline.staging import stage
from pipeline.training import Precision, Training, Worker


def main() -> int:
    """Trains, and prints a Markdown table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda (default: cpu)")
    parser.add_argument("--seeds", type=int, default=4, help="trainings of each kind (default: 4)")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    print("| precision | compiled | bound, mean of seeds | standard deviation | mean difference from float32 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        dataset = stage(open_source("digits"), str(Path(folder) / "digits")).dataset
        reference: list[float] = []
        for precision, compiled in _ways(device):
            bounds = [_bound(dataset, device, seed, precision, compiled) for seed in range(args.seeds)]
            reference = reference or bounds
            difference = mean(bounds) - mean(reference)
            print(
                f"| {precision} | {'yes' if compiled else 'no'} | {mean(bounds):.2f} | {stdev(bounds):.2f} "
                f"| {difference:+.2f} |",
                flush=True,
            )
    return 0


def _ways(device: torch.device) -> Iterator[tuple[Precision, bool]]:
    yield "float32", False
    yield "float32", True
    if device.type == "cuda":
        yield "tf32", False
    yield "bfloat16", False


def _bound(dataset: str, device: torch.device, seed: int, precision: Precision, compiled: bool) -> float:
    """Returns the validation bound of the finished model."""
    config = replace(digits(), seed=seed, precision=precision, compiled=compiled, parzen_bandwidth=None)
    training = Training(config, dataset, Manifest.load(dataset), Worker(device=device))
    for _ in training.epochs():
        pass
    return training.finish().mean


if __name__ == "__main__":
    raise SystemExit(main())

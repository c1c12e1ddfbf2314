"""Measures training and sampling on a GPU, bare: torch and a staged folder are all that it needs.

    python -m benchmarks.gpu

An epoch is the paper's: 50,000 images, T = 15, two hidden layers of 1,200 units. On a machine without a GPU the rows
are there, and say that they were not measured.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch

from benchmarks.computation import training_flops_per_image
from benchmarks.forward import SAMPLES, forward_flops, sample
from benchmarks.setup import Add, printed, short, stage_epoch
from benchmarks.timing import in_turns, matmul_rate, middle, seconds_of
from infusion_core.model import InfusionModel
from pipeline.manifest import Manifest
from pipeline.training import Precision, TrainConfig, Training, Worker

IMAGES = 50_000
EPOCHS = 4
BATCHES = (512, 4096)
WAYS: tuple[tuple[Precision, bool], ...] = (("float32", False), ("float32", True), ("tf32", True), ("bfloat16", True))
GOAL_SECONDS = 0.4


def main() -> int:
    """Takes the measurements and prints them; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="infusion-bench-") as folder:
        measure_gpu(Path(folder), lambda *row: print(printed(*row), flush=True))
    return 0


def measure_gpu(folder: Path, add: Add) -> None:
    """Takes the measurements, one after the other, if there is a GPU."""
    for batch in BATCHES:
        for precision, compiled in WAYS:
            config = dataclasses.replace(
                short(EPOCHS), global_batch=batch, statistics_images=batch, precision=precision, compiled=compiled
            )
            _measure_epoch(folder, config, add)
    _measure_samples(add)


def _measure_epoch(folder: Path, config: TrainConfig, add: Add) -> None:
    way = "compiled" if config.compiled else "eager"
    name = f"gpu_epoch_{config.global_batch}_{config.precision}_{way}_seconds"
    goal = f"≤ {GOAL_SECONDS}" if config.compiled else ""
    if not torch.cuda.is_available():
        add(name, None, "s", goal, "no GPU")
        return
    dataset = stage_epoch(folder, str(folder / f"gpu-{config.global_batch}"), IMAGES // config.global_batch)
    training = Training(config, dataset, Manifest.load(dataset), Worker(device=torch.device("cuda")))
    rate = middle([report.metrics["throughput/train_images_per_second"] for report in training.epochs()])
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    ceiling = matmul_rate(device="cuda", dtype=dtype, rows=config.global_batch)
    achieved = rate * training_flops_per_image(config.model)
    note = f"{achieved / ceiling:.0%} of {ceiling / 1e12:.1f} TFLOP/s, {config.precision}, batch {config.global_batch}"
    add(name, IMAGES / rate, "s", goal, f"{note}; {torch.cuda.get_device_name()}")


def _measure_samples(add: Add) -> None:
    if not torch.cuda.is_available():
        add("gpu_samples_flops_over_matmul_ceiling", None, "ratio", "", "no GPU")
        return
    model = InfusionModel(short(1).model).eval().cuda()
    steps = model.config.num_steps

    def draw() -> None:
        sample(model, steps)
        torch.cuda.synchronize()

    ceiling, seconds = in_turns(lambda: matmul_rate(device="cuda", rows=1000), lambda: seconds_of(draw))
    share = SAMPLES * steps * forward_flops(model.config) / seconds / ceiling
    note = f"{SAMPLES / seconds:,.0f} samples/s, T = {steps}, float32; {torch.cuda.get_device_name()}"
    add("gpu_samples_flops_over_matmul_ceiling", share, "ratio", "", note)


if __name__ == "__main__":
    raise SystemExit(main())
